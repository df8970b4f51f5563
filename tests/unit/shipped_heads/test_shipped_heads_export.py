"""Heads made of MTP layers are trained, and are written back as these layers under their own names."""

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from shipped_models import FAMILIES, RELATED, T, exported, ids, load
from transformers import AutoConfig, AutoModelForCausalLM
from weighted_mtp_core.api import Batch
from weighted_mtp_core.cli import main
from weighted_mtp_core.tracking.run_history import read_history
from weighted_mtp_core.training.head_quality import head_quality

RECIPE = """
    tracker = []
    [run]
    name = "tiny"
    [model]
    base = "{base}"
    n_future = 2
    [model.heads]
    kind = "sequential"
    init = "base"
    [data]
    use = "core.jsonl"
    options = {{ path = "rows.jsonl" }}
    [weighting]
    use = "flat_weights"
    [train]
    steps = 50
    batch_size = 4
    learning_rate = 3e-3
"""
EMBEDDING = "model.layers.4.embed_tokens.weight"


def checksums(folder):
    """The dtype, the shape and the SHA-256 of each tensor in the safetensors files of a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is not a mapping
                tensor = tensors.get_tensor(name)
                content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = tensor.dtype, tuple(tensor.shape), hashlib.sha256(content).hexdigest()
    return found


@pytest.mark.parametrize(
    ("family", "depth"), [*((each, 1) for each in (*FAMILIES, *RELATED)), ("glm4_moe", 2)]
)
def test_loading_and_exporting_changes_no_byte_of_any_tensor(base, family, depth, tmp_path):
    path = base(family, depth=depth)

    out = exported(load(path, n_future=depth + 1), tmp_path / "out")

    assert checksums(out) == checksums(path)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (path, out))
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_bfloat16(changed, family, tmp_path):
    """Routers add a bias in float32, which published models store in float32."""

    def shorter(state):
        return {
            name: tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
            for name, tensor in state.items()
        }

    path = changed(family, shorter, dtype="bfloat16")

    assert checksums(exported(load(path), tmp_path / "out", dtype=torch.bfloat16)) == checksums(path)


def test_tied_embeddings_stay_tied(changed, tmp_path):
    def tied(state):
        return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}

    path = changed("qwen3_5_text", tied, tie_word_embeddings=True)

    assert checksums(exported(load(path), tmp_path / "out")) == checksums(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_is_a_base_model_with_the_same_heads(base, family, tmp_path):
    shared = family == "qwen2"
    loaded = load(base(family), n_future=3 if shared else 2, shared=shared)
    torch.manual_seed(3)
    for parameter in loaded.policy.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)

    again = load(
        exported(loaded, tmp_path / "out", shared=shared), n_future=loaded.policy.n_future, shared=shared
    )

    own, other = loaded.policy.state_dict(), again.policy.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert loaded.policy.heads.wiring == again.policy.heads.wiring


def acceptance(policy):
    """The share of head 2's choices that head 1 confirms, and the expected tokens per pass."""
    zero_BT = torch.zeros(200, T, dtype=torch.int64)
    batch = Batch(
        ids_BT=ids(rows=200),
        document_BT=zero_BT,
        response_BT=zero_BT == 0,
        reward_BT=zero_BT.float(),
        group_BT=zero_BT,
    )
    found = head_quality(policy, [batch], split="validation", autocast=nullcontext)
    return found["validation_acceptance_head_2"], found["validation_acceptance_length"]


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_drafts_are_confirmed_before_as_after_an_export_without_a_step(base, family, tmp_path):
    loaded = load(base(family))
    before = acceptance(loaded.policy)

    assert acceptance(load(exported(loaded, tmp_path / "out")).policy) == before
    assert before > (0, 1)


def test_copies_of_the_embedding_follow_the_embedding(base, tmp_path):
    loaded = load(base("deepseek_v3"))
    loaded.policy.trunk.get_input_embeddings().weight.data += 1

    state = load_file(exported(loaded, tmp_path / "out") / "model.safetensors")

    assert torch.equal(state[EMBEDDING], state["model.embed_tokens.weight"])
    assert not torch.equal(state[EMBEDDING], load_file(base("deepseek_v3") / "model.safetensors")[EMBEDDING])


def test_transformers_drafts_with_the_exported_layers(base, tmp_path):
    """Random layers draft nothing that is right, so the text alone is compared."""
    out = exported(load(base("deepseek_v3")), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    model._keys_to_ignore_on_load_unexpected = [r"^model\.layers\.4\."]

    plain = model.generate(ids(rows=1), max_new_tokens=8, do_sample=False)
    drafted = model.generate(ids(rows=1), max_new_tokens=8, do_sample=False, use_mtp=True)

    assert AutoConfig.from_pretrained(out).num_mtp_layers == 1
    assert torch.equal(plain, drafted)


@pytest.mark.usefixtures("flat_weights")
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "qwen3_5_text", "qwen2"])
def test_a_run_of_50_steps_raises_the_acceptance_and_writes_the_layers_back(
    base, family, write_recipe, tmp_path
):
    recipe = write_recipe(RECIPE.format(base=base(family)))
    rows = [{"prompt": f"from {n}:", "response": "".join(map(str, range(n, n + 9)))} for n in range(1, 61)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    assert main(["run", str(recipe)]) == 0

    (run,) = (file.parent for file in Path("storage").rglob("run.json"))
    first, *_, last = read_history(run).metrics["policy"]["validation_acceptance_head_2"]
    assert (first.step, last.step) == (0, 50)
    assert last.value > first.value + 0.2
    assert main(["export", run.name, "--to", str(tmp_path / "out")]) == 0
    before, after = checksums(base(family)), checksums(tmp_path / "out")
    assert before.keys() == after.keys()
    trained = {name for name in before if before[name] != after[name]}
    assert {name for name in before if "eh_proj" in name or "mtp" in name} <= trained
