"""vLLM drafts with the heads of an exported model: as many drafts are accepted as by our own count.

Equal texts alone prove little, because verification repairs every wrong draft. `make test-serving` makes the
environment of vLLM; without it, these tests are skipped.

Shape letters: T positions, V vocabulary.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from weighted_mtp_core.evaluation.finished_run import policy_loader
from weighted_mtp_core.generation.generate import generate

REPOSITORY = Path(__file__).parents[2]
VLLM = Path(os.environ.get("VLLM_PYTHON", REPOSITORY / ".venv" / "vllm" / "bin" / "python"))
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
PROMPTS, NEW_TOKENS = 50, 64

pytestmark = [
    pytest.mark.skipif(not VLLM.exists(), reason="`make test-serving` makes the environment of vLLM"),
    pytest.mark.timeout(1800),
]


def wmtp(*words, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "weighted_mtp_core", *words],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of an exported micro model with medusa heads, and the command that serves it."""
    folder = tmp_path_factory.mktemp("serving")
    settings = ("tracker=[]", "model.heads.kind=medusa", "train.steps=150", "evaluate.problems=4")
    overrides = [word for each in settings for word in ("--set", each)]
    wmtp("run", str(REPOSITORY / "configs" / "baseline.toml"), *overrides, cwd=folder)
    (run,) = (file.parent for file in (folder / "storage" / "runs").rglob("run.json"))
    path, command = wmtp("export", str(run), "--to", "model", "--serve", "vllm", cwd=folder).splitlines()
    return folder / path, command


@pytest.fixture(scope="module")
def loaded(exported):
    """The policy, and prompts that it was not trained on."""
    path, _ = exported
    policy, codec = policy_loader(path, overrides=['model.device="cpu"']).load(print)
    (problems,) = (path.parent / "storage" / "datasets_v2").glob("micro_code/*/problems.jsonl")
    rows = map(json.loads, problems.read_text().splitlines())
    texts = [row["problem"]["prompt"] for row in rows if row["split"] == "test"]
    return policy.eval(), codec.encode_prompts(texts[:PROMPTS])


@pytest.fixture(scope="module")
def counted(loaded):
    """Our texts, the number of passes that verify drafts, and how many of them accept each draft.

    A text is written by head 1 alone. A pass stands at its newest token: each head drafts from the state
    before that token, and the drafts up to the first wrong one are accepted.
    """
    policy, prompts = loaded
    drafts = policy.n_future - 1
    # The last pass may accept drafts after the limit, so the texts are longer than it.
    written = [
        generate(policy, [prompt], max_new_tokens=NEW_TOKENS + drafts, eos_id=-1, decoding="plain").tokens[0]
        for prompt in prompts
    ]
    verified, accepted = 0, [0] * drafts
    for prompt, new in zip(prompts, written, strict=True):
        text = [*prompt, *new]
        with torch.no_grad():
            hidden_BTH = policy.trunk_states(torch.tensor([text]))
            drafted = [policy.logits(k, hidden_BTH)[0].argmax(dim=-1).tolist() for k in range(2, drafts + 2)]
        newest = len(prompt)
        while newest - len(prompt) < NEW_TOKENS - 1:
            right = [drafted[i][newest - 1] == text[newest + 1 + i] for i in range(drafts)]
            count = (*right, False).index(False)
            verified += 1
            accepted = [total + (place < count) for place, total in enumerate(accepted)]
            newest += count + 1
    return [list(new[:NEW_TOKENS]) for new in written], verified, accepted


def decoded_by_vllm(path, draft, loaded):
    policy, prompts = loaded
    request = {
        "model": str(path),
        "draft": str(draft),
        "drafts": policy.n_future - 1,
        "prompts": prompts,
        "new_tokens": NEW_TOKENS,
    }
    done = subprocess.run(
        [str(VLLM), str(Path(__file__).parent / "vllm_decode.py")],
        input=json.dumps(request),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_the_printed_command_names_the_draft_model(exported):
    path, command = exported

    words = shlex.split(command)

    assert words[:3] == ["vllm", "serve", path.name]
    assert (path.parent / json.loads(words[-1])["model"] / "config.json").is_file()


def test_vllm_writes_our_texts_and_accepts_as_many_drafts_at_each_place(exported, loaded, counted):
    texts, verified, accepted = counted
    path, _ = exported

    found = decoded_by_vllm(path, path / "medusa", loaded)
    print(f"\nvLLM: {found['verified']} passes, accepted {found['accepted']}; ours: {verified}, {accepted}")

    assert found["tokens"] == texts
    assert found["verified"] == pytest.approx(verified, rel=0.01)
    assert found["accepted"] == pytest.approx(accepted, rel=0.01)


def test_heads_at_the_wrong_place_have_far_fewer_drafts_accepted(exported, loaded, counted, tmp_path):
    texts, verified, accepted = counted
    path, _ = exported
    shifted = Path(shutil.copytree(path / "medusa", tmp_path / "shifted"))
    tensors = load((shifted / "model.safetensors").read_bytes())
    blocks = sorted(name for name in tensors if name.startswith("blocks."))
    moved = {name: tensors[other] for name, other in zip(blocks, [*blocks[1:], blocks[0]], strict=True)}
    save_file({**tensors, **moved}, shifted / "model.safetensors")

    found = decoded_by_vllm(path, shifted, loaded)
    print(f"\nvLLM, heads exchanged: {found['verified']} passes, accepted {found['accepted']}")

    assert found["tokens"] == texts
    assert sum(found["accepted"]) / found["verified"] < 0.3 * sum(accepted) / verified
