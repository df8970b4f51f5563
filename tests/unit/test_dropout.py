"""Dropout acts where the policy learns and nowhere else: not on signals, and not between trunk and head."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from weighted_mtp_core.api import Batch, Scores, Signal
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.targets import batch_labels, target_mask
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS
from weighted_mtp_core.training.micro_batches import micro_batches
from weighted_mtp_core.training.weighting_inputs import Signals, Weighting

V = 40


def gpt2(dropout=0.3):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V,
        n_embd=16,
        n_layer=3,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return GPT2LMHeadModel(config)


def opt():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=V,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=3,
        dropout=0.3,
        num_attention_heads=2,
    )
    return OPTForCausalLM(config)


def llama():
    torch.manual_seed(0)
    shape = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=3, num_attention_heads=2))


class ReadsStates:
    """A critic that returns what it reads."""

    reads_policy = True

    def score(self, batch, hidden_BTH):
        return Scores(value_BT=hidden_BTH.sum(dim=-1))


def batch():
    ids_BT = torch.randint(3, V, (4, 12), generator=torch.Generator().manual_seed(1))
    return Batch(
        ids_BT=ids_BT,
        document_BT=torch.zeros_like(ids_BT),
        response_BT=torch.ones_like(ids_BT, dtype=torch.bool),
        reward_BT=torch.ones(ids_BT.shape),
        group_BT=torch.zeros_like(ids_BT),
        position_BT=None,
    )


def signals(policy, *, parts):
    """Return loss, entropy and value of a batch as a weighting sees them in training."""
    needs = frozenset({Signal.TOKEN_LOSS, Signal.TOKEN_ENTROPY, Signal.VALUE})
    weighting = Weighting(strategy=None, needs=needs, critic=ReadsStates(), label="test")
    computed = Signals(policy=policy, weighting=weighting, autocast=nullcontext, distributed=SINGLE_PROCESS)
    pieces = micro_batches(batch(), parts, SINGLE_PROCESS)
    hidden = [computed.trunk(pieces[0].batch)] if parts == 1 else [None] * parts
    target_BTK = target_mask(batch_labels(batch(), policy.n_future))
    view = computed.view(batch(), target_BTK, parts=pieces, hidden=hidden, step=0, steps=1, training=True)
    return view.token_loss_BTK, view.token_entropy_BTK, view.value_BT


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("base", [gpt2, opt])
@pytest.mark.parametrize("head", ["parallel", "medusa", "sequential"])
def test_signals_are_computed_without_dropout(base, head, parts):
    policy = make_policy(base(), n_future=2, head_kind=head).train()

    once, twice = signals(policy, parts=parts), signals(policy, parts=parts)
    quiet = signals(copy.deepcopy(policy).eval(), parts=parts)

    assert policy.has_dropout
    assert policy.training
    for first, second, expected in zip(once, twice, quiet, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected)


def test_a_model_without_dropout_runs_its_trunk_once():
    policy = make_policy(llama(), n_future=2, head_kind="parallel").train()
    calls = []
    policy.trunk.register_forward_hook(lambda *_: calls.append(1))

    signals(policy, parts=1)

    assert not policy.has_dropout
    assert len(calls) == 1


def test_the_seam_between_trunk_and_head_adds_no_dropout():
    base = gpt2()
    policy = make_policy(copy.deepcopy(base), n_future=2, head_kind="parallel").train()
    ids_BT = batch().ids_BT
    torch.manual_seed(3)
    expected_BTV = base.train()(input_ids=ids_BT).logits

    torch.manual_seed(3)
    actual_BTV = policy.logits(1, policy.trunk_states(ids_BT))

    torch.testing.assert_close(actual_BTV, expected_BTV)
