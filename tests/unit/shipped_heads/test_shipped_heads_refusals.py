"""MTP layers that cannot become heads are refused, with the reason and a hint."""

import pytest
import torch
from shipped_models import exported, load
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.load import load_policy
from weighted_mtp_core.recipe.schema import HeadsTable, ModelTable


def refusal(path, **options):
    with pytest.raises(WmtpError) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value), caught.value.hint


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
