"""Heads made of MTP layers compute what transformers and vLLM compute with these layers.

Shape letters: B rows, T positions, H hidden.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from shipped_models import FAMILIES, KNOWN_TO_TRANSFORMERS, RELATED, T, ids, load
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2Model
from transformers.modeling_layers import MtpModel
from weighted_mtp_core.generation.decoding_probe import manner_of
from weighted_mtp_core.model.families import body_states
from weighted_mtp_core.model.load import load_policy
from weighted_mtp_core.recipe.schema import HeadsTable, ModelTable


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
