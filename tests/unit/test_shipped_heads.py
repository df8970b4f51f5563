"""The MTP layers of a base model become `sequential` heads, and are written back under their own names.

Shape letters: B rows, T positions, H hidden, V vocabulary.
"""

import hashlib
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2Model
from transformers.modeling_layers import MtpModel
from weighted_mtp_core.api import Batch
from weighted_mtp_core.cli import main
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.export.transformers import cast_parameters, write_export
from weighted_mtp_core.generation.decoding_probe import manner_of
from weighted_mtp_core.model.exported_model import ExportFacts
from weighted_mtp_core.model.families import body_states
from weighted_mtp_core.model.load import load_policy
from weighted_mtp_core.recipe.schema import HeadsTable, ModelTable
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
T = 14
KNOWN_TO_TRANSFORMERS = ("deepseek_v3", "glm4_moe", "qwen3_next", "qwen3_5_text", "mellum")
RELATED = ("glm4_moe_lite", "qwen3_5_moe_text")
FAMILIES = (*KNOWN_TO_TRANSFORMERS, "qwen2")
EMBEDDING = "model.layers.4.embed_tokens.weight"


@pytest.fixture(scope="module")
def shipping(repository):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "tests" / "models")
        import shipping

        yield shipping


@pytest.fixture(scope="module")
def base(shipping, tmp_path_factory):
    """Return the folder of a base model; each is made once."""
    made = {}

    def make(family, *, depth=1):
        if (family, depth) not in made:
            made[family, depth] = tmp_path_factory.mktemp(family) / "base"
            shipping.shipping_directory(family, made[family, depth], depth=depth)
        return made[family, depth]

    return make


@pytest.fixture
def changed(base, tmp_path):
    """Return a copy of a base model with other tensors or other keys in `config.json`."""

    def change(family, tensors=dict, *, depth=1, **config):
        path = shutil.copytree(base(family, depth=depth), tmp_path / "changed")
        state = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
        save_file(tensors(state), path / "model.safetensors", metadata={"format": "pt"})
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return path

    return change


def load(path, *, n_future=2, shared=False):
    heads = HeadsTable(kind="sequential", init="base", shared=shared)
    table = ModelTable(base=str(path), n_future=n_future, heads=heads)
    return load_policy(table, storage=path.parent, texts=tuple, seed=1)


def refusal(path, **options):
    with pytest.raises(WmtpError) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value), caught.value.hint


def exported(loaded, path, *, dtype=torch.float32, shared=False):
    facts = ExportFacts(
        n_future=loaded.policy.n_future,
        heads="sequential",
        init="base",
        shared=shared,
        serve="transformers",
        run="r",
        recipe_sha256="0" * 64,
        base=loaded.base_name,
        data_sha256=None,
    )
    cast_parameters(loaded.policy, dtype)
    write_export(loaded.policy, loaded.tokenizer, path, facts=facts, recipe=b"")
    return path


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


def ids(rows=2):
    return torch.randint(3, 90, (rows, T), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ what the layers compute


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "depth"), [*((each, 1) for each in (*KNOWN_TO_TRANSFORMERS, *RELATED)), ("deepseek_v3", 2)]
)
def test_heads_compute_what_transformers_own_mtp_layers_compute(base, family, depth):
    path, ids_BT = base(family, depth=depth), ids()
    policy = load(path, n_future=depth + 1).policy.eval()
    main = AutoModelForCausalLM.from_pretrained(path).eval()
    main.config.num_mtp_layers = depth
    if hasattr(main.config, "layer_types"):
        main.config.mtp_layer_types = ["full_attention"] * depth
    if hasattr(main.config, "mlp_layer_types"):
        main.config.mtp_mlp_layer_types = ["sparse"] * depth
    main._keys_to_ignore_on_load_unexpected = [r"^model\.layers\.[45]\.", r"^mtp\."]
    reference = MtpModel.from_pretrained(main).eval()

    hidden_BTH = policy.trunk_states(ids_BT)
    _, *found = policy.each_head_states(hidden_BTH, ids_BT=ids_BT, position_BT=None)

    states_BTH = main.base_model(ids_BT, use_cache=False).last_hidden_state
    for d, state_BTH in enumerate(found, start=1):
        position_BT = torch.arange(d, T).expand(2, T - d)
        states_BTH = reference.forward_layer(
            d - 1, states_BTH[:, : T - d], position_BT, None, input_ids=ids_BT[:, d:]
        )
        torch.testing.assert_close(
            policy.unembedding(state_BTH[:, : T - d]), main.lm_head(states_BTH), rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def test_mimos_layer_reads_the_state_before_the_final_norm_and_no_token_at_the_start(base):
    """As in vLLM 0.32.0, `mimo_mtp.py`."""
    path, ids_BT = base("qwen2"), ids()
    policy = load(path).policy.eval()
    found = policy.logits(2, policy.trunk_states(ids_BT), ids_BT=ids_BT)

    own = load_file(path / "model.safetensors")
    start = "model.mtp_layers.0."
    layer = {name.removeprefix(start): each for name, each in own.items() if name.startswith(start)}
    config = Qwen2Config.from_pretrained(path, num_hidden_layers=1, layer_types=["full_attention"])
    block = Qwen2Model(config).eval()
    names = {name: name.removeprefix("layers.0.") for name in block.state_dict() if name.startswith("layers")}
    block.load_state_dict(
        {name: layer[short] for name, short in names.items()}
        | {
            "norm.weight": layer["final_layernorm.weight"],
            "embed_tokens.weight": own["model.embed_tokens.weight"],
        }
    )
    main = AutoModelForCausalLM.from_pretrained(path).eval()
    unnormed = []
    main.model.norm.register_forward_pre_hook(lambda _, args: unnormed.append(args[0]))
    main(ids_BT)

    def norm(x, name):
        return (
            x
            * (x.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps).rsqrt()
            * layer[f"{name}.weight"]
        )

    token_BTH = own["model.embed_tokens.weight"][ids_BT[:, 1:]].clone()
    token_BTH[:, 0] = 0
    pair = norm(unnormed[0][:, :-1], "hidden_layernorm"), norm(token_BTH, "token_layernorm")
    inputs_BTH = torch.cat(pair, dim=-1) @ layer["input_proj.weight"].T
    expected = main.lm_head(block(inputs_embeds=inputs_BTH).last_hidden_state)
    torch.testing.assert_close(found[:, :-1], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "qwen3_5_text", "qwen2"])
def test_one_layer_for_all_heads_goes_on_after_its_own_last_state(base, family):
    """vLLM's loop over drafts: the layer's cache grows by one token for each draft."""
    policy, ids_BT = load(base(family), n_future=4, shared=True).policy.eval(), ids(rows=1)
    hidden_BTH, module = policy.trunk_states(ids_BT), policy.heads.module(2)
    _, *found = policy.each_head_states(hidden_BTH, ids_BT=ids_BT, position_BT=None)

    embedded_BTH = policy.trunk.get_input_embeddings()(ids_BT)
    first_BTH = embedded_BTH[:, 1:].clone()
    if family == "qwen2":
        first_BTH[:, 0] = 0
    for t in (0, 3, T - 4):
        inputs_BTH = module.combine(hidden_BTH[:, : t + 1], first_BTH[:, : t + 1])
        for k in range(2, 5):
            states_BTH = module.final_norm(
                body_states(module.body, inputs_embeds=inputs_BTH, position_BT=None, cache=None, seen_BS=None)
            )
            torch.testing.assert_close(found[k - 2][:, t], states_BTH[:, -1], rtol=1e-4, atol=1e-4)
            if k < 4:
                following_BTH = module.combine(states_BTH[:, -1:], embedded_BTH[:, t + k : t + k + 1])
                inputs_BTH = torch.cat([inputs_BTH, following_BTH], dim=1)


@torch.no_grad()
def test_a_hub_id_ships_the_same_layers_as_its_files(base, tmp_path, monkeypatch):
    revision = tmp_path / "models--owner--name" / "snapshots" / "5e1f"
    shutil.copytree(base("deepseek_v3"), revision)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("5e1f")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    heads = HeadsTable(kind="sequential", init="base")
    table = ModelTable(base="owner/name", n_future=2, heads=heads)

    found = load_policy(table, storage=tmp_path, texts=tuple, seed=1).policy.state_dict()

    expected = load(base("deepseek_v3")).policy.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_head_1_is_the_model_itself(base, family):
    main = AutoModelForCausalLM.from_pretrained(base(family)).eval()
    policy = load(base(family)).policy.eval()

    found = policy.logits(1, policy.trunk_states(ids()))

    torch.testing.assert_close(found, main(ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_draft_unless_the_model_is_a_hybrid(base, family):
    manner = manner_of(load(base(family)).policy.eval())

    assert (manner.no_drafts is None) == (family not in {"qwen3_next", "qwen3_5_text"})


# ------------------------------------------------------------------ the way back


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


# ------------------------------------------------------------------ what is refused


def test_a_model_without_mtp_layers_is_refused(shipping, tmp_path):
    shipping.tiny_model("llama").save_pretrained(tmp_path / "base")

    message, hint = refusal(tmp_path / "base")

    assert message == f"the base model `{tmp_path / 'base'}` ships no MTP layers"
    assert hint == 'set `model.heads.init = "new"`'


def test_a_family_with_an_unknown_computation_is_refused(changed):
    path = changed("deepseek_v3", model_type="deepseek_v32", architectures=["DeepseekV32ForCausalLM"])

    message, _ = refusal(path)

    assert message.startswith(
        "the MTP layers of a `deepseek_v32` model cannot be trained, only those of `deepseek_v3`"
    )


COUNTS = {
    ("deepseek_v3", 1, 1, False): (
        "1 MTP layer, so `model.n_future` cannot be 1",
        "set `model.n_future = 2`",
    ),
    ("deepseek_v3", 1, 4, False): (
        "1 MTP layer, so `model.n_future` cannot be 4",
        "set `model.n_future = 2`, or `model.heads.shared = true`: all heads then use the layer",
    ),
    (
        "glm4_moe",
        1,
        4,
        True,
    ): (  # vLLM feeds its layer with the state before the norm, others with that after it
        "1 MTP layer, so `model.n_future` cannot be 4 with `model.heads.shared = true`",
        "set `model.n_future = 2`",
    ),
    ("deepseek_v3", 2, 2, False): (
        "2 MTP layers, so `model.n_future` cannot be 2",
        "set `model.n_future = 3`",
    ),
    ("deepseek_v3", 2, 3, True): (
        "2 MTP layers, so `model.n_future` cannot be 3 with `model.heads.shared = true`",
        "set `model.n_future = 3` and `model.heads.shared = false`",
    ),
}


@pytest.mark.parametrize("case", COUNTS)
def test_another_number_of_heads_is_refused(base, case):
    family, depth, n_future, shared = case
    path, (message, hint) = base(family, depth=depth), COUNTS[case]

    found = refusal(path, n_future=n_future, shared=shared)

    assert found == (f"the base model `{path}` ships {message}", hint)


REFUSED = {
    "an unembedding of its own": (
        "deepseek_v3",
        lambda state: state | {"model.layers.4.shared_head.head.weight": state["lm_head.weight"] + 1},
        "`model.layers.4.shared_head.head.weight` is not a copy of the model's unembedding",
    ),
    "a missing norm": (
        "qwen3_5_text",
        lambda state: {name: each for name, each in state.items() if name != "mtp.norm.weight"},
        "`mtp.norm.weight` is missing",
    ),
    "an unknown tensor": (
        "qwen3_5_text",
        lambda state: state | {"mtp.embed_tokens.weight": state["lm_head.weight"].clone()},
        "`mtp.embed_tokens.weight` is unknown",
    ),
    "NaN": (
        "qwen2",
        lambda state: state | {"model.mtp_layers.0.input_proj.weight": torch.full((32, 64), torch.nan)},
        "`model.mtp_layers.0.input_proj.weight` contains NaN or infinity",
    ),
    "a projection of another shape": (
        "qwen2",
        lambda state: state | {"model.mtp_layers.0.input_proj.weight": torch.zeros(32, 32)},
        "they differ from its last layer",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_layers_that_cannot_become_heads_are_refused(changed, fault):
    family, tensors, why = REFUSED[fault]
    path = changed(family, tensors)

    message, hint = refusal(path)

    assert f"the MTP layers of the base model `{path}` cannot be trained: {why}" in message
    assert hint == 'set `model.heads.init = "new"`, which ignores these layers'


def test_two_layers_with_one_projection_are_refused(base):
    message, _ = refusal(base("qwen3_next", depth=2), n_future=3)

    assert message.endswith("cannot be trained: 2 layers share the projection `mtp.fc.weight`")


def test_a_tensor_that_the_decoder_layer_does_not_have_is_refused(changed):
    more = {"model.layers.4.self_attn.other.weight": torch.zeros(3)}

    message, _ = refusal(changed("deepseek_v3", lambda state: state | more))

    assert "1 tensors are not part of `DeepseekV3ForCausalLM`" in message
    assert "`model.layers.4.self_attn.other.weight`" in message


def test_a_tensor_that_the_decoder_layer_lacks_is_refused(changed):
    gone = "mtp.layers.0.mlp.up_proj.weight"

    message, _ = refusal(changed("qwen3_5_text", lambda state: {n: t for n, t in state.items() if n != gone}))

    assert "1 tensors of `Qwen3_5ForCausalLM` are missing: `model.layers.4.mlp.up_proj.weight`" in message


def test_layers_of_another_kind_than_the_last_decoder_layer_are_refused(changed):
    message, _ = refusal(changed("mellum", mtp_layer_types=["sliding_attention"]))

    assert message == (
        "the MTP layers of this `mellum` model cannot be trained: they are of the kind `sliding_attention`, "
        "its last layer is of the kind `full_attention`"
    )


def test_new_heads_cannot_begin_with_an_exported_model_of_the_base_models_own(base, tmp_path):
    out = exported(load(base("deepseek_v3")), tmp_path / "out")
    table = ModelTable(base=str(out), n_future=2, heads=HeadsTable(kind="sequential"))

    with pytest.raises(WmtpError) as caught:
        load_policy(table, storage=tmp_path, texts=tuple, seed=1)

    assert 'has heads with `init = "base"`' in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "medusa", "init": "base"}, 'needs `kind = "sequential"`'),
        ({"kind": "sequential", "init": "base", "serve": "vllm"}, 'needs `init = "new"`'),
    ],
)
def test_keys_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        HeadsTable(**values)
