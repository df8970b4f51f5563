"""Train and export a recipe, and count accepted drafts with this package and with vLLM.

Head 1 alone decides the text, up to EOS or `NEW_TOKENS` tokens. At each pass, heads 2..K draft the
tokens after the newest token, and all drafts before the first wrong draft are accepted. The count includes
drafts of the last pass after the end of the text, because vLLM counts them, too.

Shape letters: T positions, V vocabulary.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from safetensors.torch import load, save_file
from weighted_mtp_core.evaluation.finished_run import policy_loader
from weighted_mtp_core.generation.generate import generate
from weighted_mtp_core.model.policy import Policy

REPOSITORY = Path(__file__).parents[2]
BASELINE = str(REPOSITORY / "configs" / "baseline.toml")
VLLM = Path(os.environ.get("VLLM_PYTHON", REPOSITORY / ".venv" / "vllm" / "bin" / "python"))
PROMPTS, NEW_TOKENS = 50, 64
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@frozen(kw_only=True, eq=False)
class ServedModel:
    """An exported model.

    Attributes:
        path: Its directory.
        command: The command that `export --serve` printed.
        policy: The policy, as this package loads it.
        prompts: Token ids of prompts that the policy was not trained on.
        eos_id: Token id that ends a text.
    """

    path: Path
    command: str
    policy: Policy
    prompts: Sequence[list[int]]
    eos_id: int


@frozen(kw_only=True)
class Drafting:
    """Texts, and how many drafts were accepted while they were written.

    Attributes:
        tokens: New tokens of each prompt, including EOS if a text has it.
        verified: Number of passes that verified drafts.
        accepted: Number of these passes that accepted the first, second, ... draft.
    """

    tokens: list[list[int]]
    verified: int
    accepted: list[int]

    @property
    def accepted_per_pass(self) -> float:
        """Mean number of accepted drafts per pass."""
        return sum(self.accepted) / self.verified


def wmtp(*words: str, cwd: Path) -> str:
    """Run `python -m weighted_mtp_core`; return what it printed."""
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


def trained_and_exported(
    recipe: str, folder: Path, *, storage: Path, server: str, settings: Sequence[str] = ()
) -> ServedModel:
    """Train a recipe of `configs/` with changes `key=value`, and export it for a server."""
    folders = (f'run.storage="{storage}"', f'run.output_dir="{folder / "runs"}"')
    every = ("tracker=[]", "evaluate.problems=4", *folders, *settings)
    overrides = [word for each in every for word in ("--set", each)]
    wmtp("run", str(REPOSITORY / "configs" / recipe), *overrides, cwd=folder)
    (run,) = (file.parent for file in (folder / "runs").rglob("run.json"))
    path, command = wmtp("export", str(run), "--to", "model", "--serve", server, cwd=folder).splitlines()
    policy, codec = policy_loader(folder / path, overrides=['model.device="cpu"']).load(print)
    texts = [row["problem"]["prompt"] for row in problems_of(storage) if row["split"] == "test"]
    return ServedModel(
        path=folder / path,
        command=command,
        policy=policy.eval(),
        prompts=codec.encode_prompts(texts[:PROMPTS]),
        eos_id=codec.eos_id,
    )


def problems_of(storage: Path) -> list[dict[str, Any]]:
    """Return the rows of the problems of micro_code."""
    (file,) = (storage / "datasets_v2").glob("micro_code/*/problems.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def with_random_tensors(model: ServedModel, path: Path, prefix: str) -> ServedModel:
    """Copy an exported model; tensors whose names begin with `prefix` get random values of the same scale."""
    shutil.copytree(model.path, path)
    generator = torch.Generator().manual_seed(0)
    for file in path.glob("*.safetensors"):
        tensors = load(file.read_bytes())
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                tensors[name] = torch.randn(tensor.shape, generator=generator) * tensor.std()
        save_file(tensors, file, metadata={"format": "pt"})
    return evolve(model, path=path)


def own_count(model: ServedModel, drafted: Callable[[list[int], int], Sequence[Sequence[int]]]) -> Drafting:
    """Generate the texts, and count the accepted drafts.

    Args:
        model: The model.
        drafted: Returns the tokens that heads 2..K draft in a text, given its tokens and the number of
            drafts: `[d][t]` is the draft for position t + 2 + d of a pass whose newest token is at t + 1.
    """
    drafts = model.policy.n_future - 1
    texts, verified, accepted = [], 0, [0] * drafts
    for prompt in model.prompts:
        # The last pass may accept drafts after the end, so the text goes on there.
        new = list(
            generate(
                model.policy, [prompt], max_new_tokens=NEW_TOKENS + drafts, eos_id=-1, decoding="plain"
            ).tokens[0]
        )
        length = new.index(model.eos_id) + 1 if model.eos_id in new[:NEW_TOKENS] else NEW_TOKENS
        texts.append(new[:length])
        text = [*prompt, *new]
        guesses = drafted(text, drafts)
        newest = len(prompt)
        while newest < len(prompt) + length - 1:
            right = [guesses[d][newest - 1] == text[newest + 1 + d] for d in range(drafts)]
            count = (*right, False).index(False)
            verified += 1
            accepted = [total + (place < count) for place, total in enumerate(accepted)]
            newest += count + 1
    return Drafting(tokens=texts, verified=verified, accepted=accepted)


def decoded_by_vllm(model: ServedModel, speculative_config: dict[str, Any]) -> Drafting:
    """Let vLLM generate the texts."""
    request = {
        "model": str(model.path),
        "speculative_config": speculative_config,
        "prompts": model.prompts,
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
    return Drafting(**json.loads(done.stdout))
