"""Exactly the given layers get adapters; a name without a layer, a bypassed or a shared matrix is refused."""

import copy

import pytest
import torch
from adapted_policies import PLAIN, K, adapted, base
from weighted_mtp_core.api import WmtpError, add_adapters
from weighted_mtp_core.model.adapters import adapt, adapted_layers
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.recipe.schema import AdaptersTable, ModelTable


def test_a_target_without_a_linear_layer_of_this_name_is_refused():
    with pytest.raises(WmtpError, match="no linear layer `query` to adapt") as caught:
        adapted(options=AdaptersTable(targets=("q_proj", "query")))

    assert "`q_proj`" in caught.value.hint


class Fused(torch.nn.Module):
    """Reads the matrix of one of its layers, as fused kernels do."""

    def __init__(self):
        super().__init__()
        self.called = torch.nn.Linear(4, 4)
        self.bypassed = torch.nn.Linear(4, 4)

    def forward(self, input_NI):
        return self.called(input_NI) @ self.bypassed.weight.to(self.called.weight.dtype)


def test_a_layer_whose_matrix_is_read_without_a_call_is_refused():
    with pytest.raises(WmtpError, match="an adapter of `bypassed` would have no effect") as caught:
        add_adapters(torch.nn.Sequential(Fused()), rank=2)

    assert caught.value.hint == "set the targets to `called`, or to some of them"
    add_adapters(torch.nn.Sequential(Fused()), rank=2, targets=("called",))


def test_an_attention_of_torch_that_reads_the_matrix_of_its_last_layer_is_refused():
    module = torch.nn.ModuleDict(
        {"attention": torch.nn.MultiheadAttention(8, 2), "out": torch.nn.Linear(8, 8)}
    )

    with pytest.raises(WmtpError, match="an adapter of `out_proj` would have no effect") as refused:
        add_adapters(module, rank=2)

    assert refused.value.hint == "set the targets to `out`, or to some of them"


def test_only_the_given_layers_are_adapted_although_a_longer_name_ends_like_theirs():
    layer, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    module = torch.nn.ModuleDict({"own": layer, "more": torch.nn.ModuleDict({"own": other})})

    add_adapters(module, rank=2, layers=[layer])

    assert [name for name, _ in adapted_layers(module)] == ["own"]


def test_adapters_of_layers_that_share_a_matrix_are_refused():
    """Merging both adapters would add each of them to both layers."""
    made = copy.deepcopy(base("llama"))
    first, second, _ = made.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    policy = make_policy(made, n_future=K, head_kind="medusa")

    with pytest.raises(
        WmtpError,
        match=r"`trunk\.layers\.0\.mlp\.up_proj` and `trunk\.layers\.1\.mlp\.up_proj` share a matrix",
    ):
        adapt(policy, ModelTable(train="adapters", adapters=PLAIN))


def test_layers_directly_in_the_module_are_adapted():
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))

    add_adapters(module, rank=2)

    trained = {name for name, each in module.named_parameters() if each.requires_grad}
    assert trained == {f"{layer}.lora_{kind}.default.weight" for layer in (0, 2) for kind in "AB"}
