"""A causal language model becomes trunk, heads and unembedding; head 1 still is that model."""

import copy
import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from weighted_mtp_core.api import Batch
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.probe import compare, observe
from weighted_mtp_core.model.sparse_feed_forward import one_position_per_row, sparse_rows
from weighted_mtp_core.model.trunk import frozen_trunk

V, K, LAYERS = 40, 3, 3
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}


def llama(*, tied, layers=LAYERS):
    config = {**SMALL, "num_hidden_layers": layers, "tie_word_embeddings": tied, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**config, num_key_value_heads=1))


def qwen2(*, tied):
    config = {**SMALL, "tie_word_embeddings": tied, "intermediate_size": 32}
    return Qwen2ForCausalLM(Qwen2Config(**config, num_key_value_heads=1))


def gpt2(*, tied):
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=16, n_layer=LAYERS, n_head=2, tie_word_embeddings=tied)
    )


MLP = {llama: "layers.0.mlp", qwen2: "layers.0.mlp", gpt2: "h.0.mlp"}
KINDS = [
    (base, tied, head)
    for base in (llama, qwen2, gpt2)
    for tied in (True, False)
    for head in ("parallel", "medusa")
]
IDS = [f"{base.__name__}-{'tied' if tied else 'untied'}-{head}" for base, tied, head in KINDS]
every_kind = pytest.mark.parametrize(("base", "tied", "head"), KINDS, ids=IDS)


@functools.cache
def made(base, tied, head):
    """A base model, and a policy made of its copy."""
    torch.manual_seed(0)
    model = base(tied=tied).eval()
    for parameter in model.parameters():  # far from the initial scale, at which all positions are alike
        torch.nn.init.normal_(parameter, std=0.2)
    return model, make_policy(copy.deepcopy(model), n_future=K, head_kind=head).eval()


def ids(rows=2, length=9, *, seed=1):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


@every_kind
def test_head_1_is_the_model_that_the_policy_was_made_of(base, tied, head):
    model, policy = made(base, tied, head)

    logits = policy.logits(1, policy.trunk_states(ids()))

    torch.testing.assert_close(logits, model(input_ids=ids()).logits, rtol=1e-5, atol=1e-5)


@every_kind
def test_sparse_states_equal_those_of_the_whole(base, tied, head):
    _, policy = made(base, tied, head)
    hidden_BTH = policy.trunk_states(ids())
    index_N, index_R = torch.tensor([1, 3, 8, 9, 17]), torch.tensor([2, 9 + 7])

    for k in range(1, K + 1):
        whole_BTH = policy.head_states(k, hidden_BTH)
        with sparse_rows(policy.heads.layer(k), index_N):
            some_BTH = policy.head_states(k, hidden_BTH)
        with one_position_per_row(policy.heads.layer(k), index_R):
            one_BTH = policy.head_states(k, hidden_BTH)

        torch.testing.assert_close(some_BTH.flatten(0, 1)[index_N], whole_BTH.flatten(0, 1)[index_N])
        torch.testing.assert_close(one_BTH.flatten(0, 1)[index_R], whole_BTH.flatten(0, 1)[index_R])
        assert torch.equal(policy.head_states(k, hidden_BTH), whole_BTH)


def test_a_head_whose_states_are_not_numbers_is_refused():
    base = llama(tied=False)
    policy = make_policy(copy.deepcopy(base), n_future=2, head_kind="parallel")
    with torch.no_grad():
        policy.heads.layer(2).mlp.down_proj.weight.fill_(torch.nan)

    with pytest.raises(
        WmtpError, match=r"^head 2 of a `llama` model with `parallel` heads gives other states"
    ):
        compare(policy, observe(base))


@pytest.mark.parametrize("base", [llama, qwen2, gpt2])
def test_a_heads_feed_forward_network_computes_only_the_sparse_rows(base):
    _, policy = made(base, False, "parallel")
    hidden_BTH = policy.trunk_states(ids())
    with FlopCounterMode(display=False) as whole:
        policy.head_states(2, hidden_BTH)
    with FlopCounterMode(display=False) as some, sparse_rows(policy.heads.layer(2), torch.tensor([4])):
        policy.head_states(2, hidden_BTH)

    weights = sum(
        each.numel() for each in policy.heads[1].get_submodule(MLP[base]).parameters() if each.ndim == 2
    )
    places = ids().numel()

    assert whole.get_total_flops() - some.get_total_flops() == 2 * weights * (places - 1)


def test_the_matrix_of_a_medusa_head_is_multiplied_only_at_the_sparse_rows():
    _, policy = made(llama, False, "medusa")
    hidden_BTH = policy.trunk_states(ids())

    with FlopCounterMode(display=False) as some, sparse_rows(policy.heads.layer(2), torch.tensor([4, 7])):
        policy.head_states(2, hidden_BTH)

    assert some.get_total_flops() == 2 * 2 * policy.hidden_size**2


@every_kind
def test_the_other_heads_start_like_head_1(base, tied, head):
    _, policy = made(base, tied, head)
    hidden = policy.trunk_states(ids())

    for k in range(2, K + 1):
        torch.testing.assert_close(policy.logits(k, hidden), policy.logits(1, hidden))


@pytest.mark.parametrize("base", [llama, qwen2, gpt2])
def test_medusa_heads_compute_the_formula(base):
    model, policy = copy.deepcopy(made(base, True, "medusa"))
    matrices = [torch.nn.init.normal_(each.linear.weight, std=0.3) for each in policy.heads[1:]]
    state_BTH = model.base_model(input_ids=ids()).last_hidden_state

    for k, matrix_HH in enumerate(matrices, start=2):
        product_BTH = torch.einsum("ij,btj->bti", matrix_HH, state_BTH)
        expected_BTH = state_BTH + product_BTH / (1 + torch.exp(-product_BTH))

        logits_BTV = policy.logits(k, policy.trunk_states(ids()))

        torch.testing.assert_close(logits_BTV, model.lm_head(expected_BTH), rtol=1e-4, atol=1e-4)


@every_kind
def test_heads_share_the_unembedding_and_nothing_else(base, tied, head):
    _, policy = made(base, tied, head)
    own = [{id(parameter) for parameter in each.parameters()} for each in policy.heads]

    assert not own[1] & own[2]
    assert not own[0] & own[1]
    assert sum(parameter is policy.unembedding.weight for parameter in policy.parameters()) == 1
    assert (policy.trunk.get_input_embeddings().weight is policy.unembedding.weight) == tied


@every_kind
def test_gradients_of_all_heads_reach_every_parameter(base, tied, head):
    policy = copy.deepcopy(made(base, tied, head)[1])
    hidden = policy.trunk_states(ids(length=12))

    sum(policy.logits(k, hidden).square().sum() for k in range(1, K + 1)).backward()

    without = [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@every_kind
def test_tokens_fed_one_by_one_through_the_caches_give_the_same_logits(base, tied, head):
    _, policy = made(base, tied, head)
    whole = [policy.logits(k, policy.trunk_states(ids())) for k in range(1, K + 1)]
    caches = policy.new_caches()
    heads = caches.heads or (None,) * K

    for t in range(ids().shape[1]):
        hidden = policy.trunk_states(ids()[:, t : t + 1], cache=caches.trunk)
        for k in range(1, K + 1):
            states = policy.head_states(k, hidden, cache=heads[k - 1])
            torch.testing.assert_close(
                policy.unembedding(states)[:, 0], whole[k - 1][:, t], rtol=1e-4, atol=1e-4
            )


@every_kind
def test_later_tokens_do_not_change_a_position(base, tied, head):
    _, policy = made(base, tied, head)
    padded = torch.cat([ids(), torch.zeros(2, 4, dtype=torch.long)], dim=1)

    for k in range(1, K + 1):
        torch.testing.assert_close(
            policy.logits(k, policy.trunk_states(padded))[:, :9], policy.logits(k, policy.trunk_states(ids()))
        )


@every_kind
def test_a_frozen_trunk_never_changes(base, tied, head):
    policy = copy.deepcopy(made(base, tied, head)[1])
    nothing = torch.zeros(2, 9)
    batch = Batch(
        ids_BT=ids(),
        document_BT=nothing.long(),
        response_BT=nothing.bool(),
        reward_BT=nothing,
        group_BT=nothing.long(),
    )
    frozen = frozen_trunk(policy)
    before = frozen(batch)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)

    assert torch.equal(frozen(batch), before)
    assert not torch.allclose(policy.trunk_states(ids()), before)
    assert (before.dtype, before.requires_grad) == (torch.float32, False)


def test_one_head_is_the_whole_model():
    policy = make_policy(llama(tied=True), n_future=1, head_kind="parallel")

    assert len(policy.heads) == 1
    assert policy.hidden_size == 16
    assert policy.vocab_size == V


def test_a_model_of_one_layer_has_no_trunk_for_transformer_heads():
    with pytest.raises(WmtpError, match="a model of one layer has no trunk left") as caught:
        make_policy(llama(tied=True, layers=1), n_future=2, head_kind="parallel")

    assert 'model.heads.kind = "medusa"' in caught.value.hint
    make_policy(llama(tied=True, layers=1), n_future=2, head_kind="medusa")


def test_the_bias_of_an_unembedding_is_trained_with_it():
    with_bias = GPTJForCausalLM(
        GPTJConfig(vocab_size=V, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_inner=32)
    )
    bias = with_bias.lm_head.bias

    policy = make_policy(with_bias, n_future=2, head_kind="medusa")

    assert dict(policy.named_parameters())["unembedding.bias"] is bias
