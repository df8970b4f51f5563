"""`export --adapter`: plain peft loads the adapter onto the base with the same logits."""

import copy
import json

import pytest
import torch
from adapted_policies import OPTIONS, PLAIN, SMALL, V, adapted, all_logits, base, batch_of
from attrs import evolve
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaForCausalLM,
)
from weighted_mtp_core.api import WmtpError
from weighted_mtp_core.export.adapter import write_adapter
from weighted_mtp_core.model.adapters import adapt
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.recipe.schema import AdaptersTable, ModelTable


@pytest.mark.parametrize(
    ("name", "head", "options"),
    [
        ("llama", "parallel", "plain"),
        ("llama", "medusa", "few"),
        ("tied", "sequential", "dora"),
        ("tied", "sequential", "adapted"),
        ("gpt2", "parallel", "rslora"),
    ],
)
def test_plain_peft_loads_an_exported_adapter_onto_the_base_with_the_same_logits(
    name, head, options, tmp_path
):
    policy = adapted(name, head=head, options=evolve(OPTIONS[options], dropout=0.1), moved=True)
    base(name).save_pretrained(tmp_path / "base")
    ids_BT = batch_of(0).ids_BT
    expected = all_logits(policy, ids_BT)[0]

    write_adapter(policy, tmp_path / "adapter", dtype=torch.float32, recipe=b"")

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        before = plain(ids_BT).logits
        loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        found = loaded(ids_BT).logits
    assert float((found - expected).abs().max()) <= 1e-5
    assert float((found - before).abs().max()) > 1e-2
    assert torch.equal(all_logits(policy, ids_BT)[0], expected)


def test_an_adapter_is_exported_with_whole_names_if_another_module_has_the_same_last_part(tmp_path):
    """In CTRL, `0` is the name of a linear layer in each decoder layer, and of a decoder layer."""
    torch.manual_seed(0)
    config = CTRLConfig(vocab_size=V, n_embd=16, dff=32, n_layer=3, n_head=2, n_positions=32)
    model = CTRLLMHeadModel(config).eval()
    policy = make_policy(copy.deepcopy(model), n_future=2, head_kind="medusa")
    adapt(policy, ModelTable(train="adapters", adapters=PLAIN))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids_BT = batch_of(0).ids_BT

    write_adapter(policy, tmp_path / "adapter", dtype=torch.float32, recipe=b"")

    with torch.no_grad():
        found = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(ids_BT).logits
    torch.testing.assert_close(found, all_logits(policy, ids_BT)[0], rtol=1e-4, atol=1e-4)


def test_an_exported_adapter_names_its_base_and_the_last_parts_of_its_layers(tmp_path):
    base("llama").save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    policy = make_policy(model, n_future=2, head_kind="parallel")
    adapt(policy, ModelTable(train="adapters", adapters=AdaptersTable(targets=("q_proj", "up_proj"))))

    write_adapter(policy, tmp_path / "adapter", dtype=torch.bfloat16, recipe=b"x = 1\n")

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert sorted(config["target_modules"]) == ["q_proj", "up_proj"]
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (8, 16, "CAUSAL_LM")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 3 * 2 * 2
    assert {each.dtype for each in tensors.values()} == {torch.bfloat16}
    assert (tmp_path / "adapter" / "recipe.toml").read_bytes() == b"x = 1\n"


def test_an_adapter_that_peft_would_load_as_another_one_is_refused(tmp_path):
    shape = SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    small = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
    latent = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    config = DeepseekV3Config(**shape, **small, **latent, first_k_dense_replace=1, topk_group=1)
    policy = make_policy(DeepseekV3ForCausalLM(config), n_future=2, head_kind="medusa")
    adapt(policy, ModelTable(train="adapters", adapters=PLAIN))

    with pytest.raises(WmtpError, match="peft would load the adapter of this `deepseek_v3` model as another"):
        write_adapter(policy, tmp_path / "adapter", dtype=torch.float32, recipe=b"")
    assert not (tmp_path / "adapter").exists()
