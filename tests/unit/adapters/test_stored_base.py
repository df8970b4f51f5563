"""`model.base_dtype`: a base stored in bfloat16 or NF4 computes like its float32 values, or is refused."""

import copy
import sys

import bitsandbytes
import pytest
import torch
from adapted_policies import PLAIN, SMALL, adapted, all_logits, batch_of, learner, new_policy
from transformers import MixtralConfig, MixtralForCausalLM
from weighted_mtp_core.api import WmtpError
from weighted_mtp_core.model.adapters import adapt
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.stored_base import restore_base
from weighted_mtp_core.recipe.schema import ModelTable

NF4 = [  # the values of NormalFloat, QLoRA (Dettmers et al. 2023), appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
]  # fmt: skip


@pytest.mark.parametrize(("name", "head"), [("llama", "parallel"), ("tied", "medusa"), ("opt", "sequential")])
@pytest.mark.parametrize("base_dtype", ["bfloat16", "nf4"])
def test_a_stored_base_computes_like_its_float32_values(name, head, base_dtype):
    policy = adapted(name, head=head, base_dtype=base_dtype, moved=True)
    restored = copy.deepcopy(policy)
    restore_base(restored)

    assert torch.equal(all_logits(policy, batch_of(0).ids_BT), all_logits(restored, batch_of(0).ids_BT))
    for each in (policy, restored):
        learner(each).learn(batch_of(0), step=0)
    for own, other in zip(policy.parameters(), restored.parameters(), strict=True):
        assert own.requires_grad == other.requires_grad
        if own.requires_grad:
            torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_matrices_of_a_bfloat16_base_are_the_nearest_bfloat16_values_and_norms_stay_float32(name):
    exact = dict(new_policy(name).named_parameters())
    restored = adapted(name, base_dtype="bfloat16")
    restore_base(restored)

    for own_name, own in restored.named_parameters():
        if own.requires_grad:
            continue
        expected = exact[own_name.replace(".base_layer", "")].detach()
        if expected.ndim == 2:
            assert not torch.equal(own, expected), own_name
            expected = expected.bfloat16().float()
        assert torch.equal(own, expected), own_name


def test_an_nf4_base_holds_the_nearest_of_16_values_in_half_a_byte():
    policy = adapted(base_dtype="nf4")
    layer = policy.trunk.layers[0].mlp.up_proj.base_layer
    exact = new_policy().trunk.layers[0].mlp.up_proj.weight.detach().flatten().view(-1, 64)
    scale = exact.abs().amax(dim=1, keepdim=True)
    stored = layer.matrix(torch.float32).flatten().view(-1, 64) / scale

    assert layer.weight.nbytes == exact.numel() // 2
    distance = ((exact / scale)[:, :, None] - torch.tensor(NF4)).abs()
    torch.testing.assert_close(stored, torch.tensor(NF4)[distance.argmin(dim=2)], rtol=1e-5, atol=1e-6)


def test_matrices_that_bitsandbytes_reads_back_wrongly_are_refused(monkeypatch):
    quantize = bitsandbytes.functional.quantize_4bit

    def rotated(matrix, **options):
        return quantize(matrix.roll(1), **options)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", rotated)

    with pytest.raises(WmtpError, match="does not read its own 4-bit matrices correctly"):
        adapted(base_dtype="nf4")


@pytest.mark.parametrize("base_dtype", ["bfloat16", "nf4"])
def test_a_stored_base_computes_in_the_dtype_of_autocast(base_dtype):
    policy = adapted(base_dtype=base_dtype, moved=True).eval()
    ids_BT = batch_of(0).ids_BT
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        projected = policy.trunk.layers[0].mlp.up_proj(torch.randn(2, 16))
        hidden_BTH = policy.trunk_states(ids_BT)
        logits = policy.logits(1, hidden_BTH)

    assert projected.dtype == torch.bfloat16
    exact = all_logits(policy, ids_BT)[0]
    assert float((logits - exact).abs().max()) <= 0.03 * float(exact.abs().max())


def test_a_model_with_other_layers_than_linear_ones_cannot_be_stored_in_fewer_bits():
    with pytest.raises(
        WmtpError, match="cannot be stored in bfloat16: they are in layers of the class `Conv1D`"
    ):
        adapted("gpt2", base_dtype="bfloat16")


def test_nf4_without_bitsandbytes_is_an_error_that_names_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)

    with pytest.raises(WmtpError, match="needs the package `bitsandbytes`, which is not installed") as caught:
        adapted(base_dtype="nf4")

    assert caught.value.hint == "pip install 'weighted-mtp-core[nf4]'"


@pytest.mark.parametrize("base_dtype", ["bfloat16", "nf4"])
def test_experts_that_would_stay_float32_are_refused(base_dtype):
    config = MixtralConfig(**SMALL, intermediate_size=32, num_key_value_heads=1, num_local_experts=4)
    policy = make_policy(MixtralForCausalLM(config), n_future=2, head_kind="parallel")

    with pytest.raises(WmtpError, match="they are in layers of the class `MixtralExperts`"):
        adapt(policy, ModelTable(train="adapters", adapters=PLAIN, base_dtype=base_dtype))
