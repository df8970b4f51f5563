"""The gates of feed-forward networks: the trunk stores none, and the backward pass computes the same bits."""

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config
from transformers.activations import ACT2FN
from weighted_mtp_core.model.adapters import adapt
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.recomputed_gates import recompute_gates
from weighted_mtp_core.recipe.schema import ModelTable

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {"llama": LlamaConfig(**SIZES), "qwen3": Qwen3Config(**SIZES)}
OTHER_FUNCTION = Gemma2Config(**SIZES)  # its gates are GELUs


def new_policy(config, train="all"):
    torch.manual_seed(0)
    policy = make_policy(AutoModelForCausalLM.from_config(config), n_future=2, head_kind="parallel")
    if train == "adapters":
        adapt(policy, ModelTable(train="adapters"))
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:  # new adapters have B = 0, so A would have no gradient
                nn.init.normal_(parameter)
    return policy


def states(policy):
    return policy.trunk_states(torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1)))


def gradients(policy):
    states(policy).square().sum().backward()
    return {name: each.grad for name, each in policy.trunk.named_parameters() if each.grad is not None}


def living_gates(policy):
    """Return how many outputs of the networks' functions exist after a forward pass, and the states."""
    outputs = []
    for layer in policy.trunk.layers:
        layer.mlp.act_fn.register_forward_hook(
            lambda _, __, output: outputs.append(weakref.ref(output.untyped_storage()))
        )
    found = states(policy)
    gc.collect()
    assert len(outputs) == len(policy.trunk.layers)
    return sum(each() is not None for each in outputs), found


@pytest.mark.parametrize("train", ["all", "adapters"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradients_have_the_bits_of_stored_gates(name, train):
    expected = gradients(new_policy(CONFIGS[name], train))
    policy = new_policy(CONFIGS[name], train)
    recompute_gates(policy.trunk)

    found = gradients(policy)

    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(found[each], expected[each]) for each in found)


@pytest.mark.parametrize("train", ["all", "adapters"])
def test_no_gate_is_stored(train):
    policy = new_policy(CONFIGS["llama"], train)
    assert living_gates(policy)[0] == len(policy.trunk.layers)
    recompute_gates(policy.trunk)

    living, _states = living_gates(policy)

    assert living == 0


def test_with_activation_checkpointing_nothing_changes():
    expected = gradients(new_policy(CONFIGS["llama"]))
    policy = new_policy(CONFIGS["llama"])
    policy.recompute_activations()
    recompute_gates(policy.trunk)

    found = gradients(policy)

    assert all(torch.equal(found[each], expected[each]) for each in expected)


def test_other_functions_than_silu_are_stored_as_before():
    expected = gradients(new_policy(OTHER_FUNCTION))
    policy = new_policy(OTHER_FUNCTION)
    recompute_gates(policy.trunk)

    found = gradients(policy)

    assert all(torch.equal(found[each], expected[each]) for each in expected)


def test_a_sibling_of_silu_may_be_called_with_anything():
    class Other(nn.Module):
        def forward(self, *given, **named):
            return given, named

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.act_fn, self.other = ACT2FN["silu"], Other()

    parent = Parent()
    recompute_gates(parent)

    for given in ((), (3,), ((1, 2), None), (torch.ones(2),)):
        assert parent.other(*given, name=given) == (given, {"name": given})
