"""Stacked layers give the outputs of each alone; layers that cannot be stacked are called one by one."""

import copy

import attrs
import pytest
import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from weighted_mtp_core.generation.draft_heads import DecodingHeads
from weighted_mtp_core.generation.stacked_layers import stack
from weighted_mtp_core.model.load import make_policy

V, K = 40, 4
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
GATED = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GATED)),
    "qwen2, with biases": lambda: Qwen2ForCausalLM(Qwen2Config(**GATED)),
    "qwen3, with norms of queries": lambda: Qwen3ForCausalLM(Qwen3Config(**GATED)),
    "gemma, whose norms add 1": lambda: GemmaForCausalLM(GemmaConfig(**GATED)),
    "gpt-neox, with torch's norms": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=32)),
}


def drifted(base):
    """A policy of this model with different heads."""
    torch.manual_seed(0)
    policy = make_policy(base.eval(), n_future=K, head_kind="parallel").eval()
    for parameter in policy.parameters():  # far from the initial scale, at which all positions are alike
        nn.init.normal_(parameter, std=0.2)
    return policy


def drafted(heads):
    """The drafting heads' states of a prompt, of the next block, and of one after a row has finished."""
    first_RT = torch.tensor([[5, 9, 4, 31], [7, 1, 12, 30]])
    cache = heads.new_caches()
    states = []
    for begin, ids_RT, place_R in (
        (0, first_RT, torch.tensor([3, 1])),
        (4, first_RT.flip(1)[:, :2], torch.tensor([0, 1])),
        (6, first_RT[1:, :3], torch.tensor([2])),
    ):
        rows, width = ids_RT.shape
        if rows == 1:
            heads.keep(cache, torch.tensor([1]), rows=2)
        seen_RS = torch.ones(rows, begin + width, dtype=torch.bool)
        position_RT = torch.arange(begin, begin + width).expand(rows, -1)
        block = heads.read(ids_RT, position_RT=position_RT, cache=cache, seen=seen_RS)
        block.head_1()
        states.append(block.drafting_heads_at(place_R))
    return states


@pytest.mark.parametrize("name", BASES)
@torch.inference_mode()
def test_stacked_drafting_heads_give_the_states_of_each_alone(name):
    together = DecodingHeads.of(drifted(BASES[name]()), drafts=K - 1)
    alone = attrs.evolve(together, stacked=None)

    assert together.stacked is not None
    for ours, expected in zip(drafted(together), drafted(alone), strict=True):
        assert ours.std() > 0.1
        torch.testing.assert_close(ours, expected)


def test_layers_with_an_unknown_module_are_not_stacked():
    policy = drifted(GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2)))

    assert DecodingHeads.of(policy, drafts=K - 1).stacked is None


def test_layers_with_experts_are_not_stacked():
    layers = [nn.Sequential(nn.LayerNorm(4), nn.ModuleList([nn.Linear(4, 4)])) for _ in range(2)]

    assert stack(layers) is None


def test_stacking_draws_no_random_numbers():
    layers = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)]
    before = torch.get_rng_state()

    assert stack(layers) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_stacking_does_not_change_the_layers():
    layers = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)]
    before = copy.deepcopy(layers)

    stack(layers)

    for layer, copied in zip(layers, before, strict=True):
        assert [type(part) for part in layer] == [nn.Linear, nn.LayerNorm]
        assert all(map(torch.equal, layer.parameters(), copied.parameters()))
