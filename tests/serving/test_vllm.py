"""vLLM drafts with the heads of an exported model, and accepts as many drafts as this package predicts.

Equal texts alone prove little, because verification repairs every wrong draft. `make test-serving` makes the
environment of vLLM; without this environment, these tests are skipped.

Shape letters: B rows, T positions, H hidden, V vocabulary.
"""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from served_model import VLLM, decoded_by_vllm, own_count, trained_and_exported

pytestmark = [
    pytest.mark.skipif(not VLLM.exists(), reason="`make test-serving` makes the environment of vLLM"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def medusa(tmp_path_factory, storage):
    """The micro model of configs/serve_medusa.toml, exported for vLLM."""
    folder = tmp_path_factory.mktemp("medusa")
    return trained_and_exported("serve_medusa.toml", folder, storage=storage, server="vllm")


@pytest.fixture(scope="module")
def counted(medusa):
    """This package's count of accepted drafts; heads 2..K draft from the state before the newest token."""

    def drafted(text, drafts):
        with torch.no_grad():
            hidden_BTH = medusa.policy.trunk_states(torch.tensor([text]))
            logits = [medusa.policy.logits(k, hidden_BTH)[0] for k in range(2, drafts + 2)]
        return [logits_TV.argmax(dim=-1).tolist() for logits_TV in logits]

    return own_count(medusa, drafted)


def with_draft(model, draft):
    drafts = model.policy.n_future - 1
    return decoded_by_vllm(model, {"method": "medusa", "model": str(draft), "num_speculative_tokens": drafts})


def test_the_printed_command_names_the_draft_model(medusa):
    words = shlex.split(medusa.command)

    assert words[:3] == ["vllm", "serve", medusa.path.name]
    assert (medusa.path.parent / json.loads(words[-1])["model"] / "config.json").is_file()


def test_vllm_writes_our_texts_and_accepts_as_many_drafts_at_each_place(medusa, counted):
    found = with_draft(medusa, medusa.path / "medusa")
    print(f"\nvLLM: {found.verified} passes, accepted {found.accepted}")
    print(f"ours: {counted.verified} passes, accepted {counted.accepted}")

    assert found.tokens == counted.tokens
    assert found.verified == pytest.approx(counted.verified, rel=0.01)
    assert found.accepted == pytest.approx(counted.accepted, rel=0.01)
    assert found.accepted_per_pass >= 2.0


def test_heads_at_the_wrong_place_have_far_fewer_drafts_accepted(medusa, counted, tmp_path):
    shifted = Path(shutil.copytree(medusa.path / "medusa", tmp_path / "shifted"))
    tensors = load((shifted / "model.safetensors").read_bytes())
    blocks = sorted(name for name in tensors if name.startswith("blocks."))
    moved = {name: tensors[other] for name, other in zip(blocks, [*blocks[1:], blocks[0]], strict=True)}
    save_file({**tensors, **moved}, shifted / "model.safetensors")

    found = with_draft(medusa, shifted)
    print(f"\nvLLM, heads exchanged: {found.verified} passes, accepted {found.accepted}")

    assert found.tokens == counted.tokens
    assert found.accepted_per_pass < 0.3 * counted.accepted_per_pass
