"""Documents that share a row know nothing of each other: losses and gradients are those of each alone."""

import functools

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from weighted_mtp_core.api import Batch
from weighted_mtp_core.model.frozen import frozen_losses
from weighted_mtp_core.model.loss import token_losses, weighted_mtp_loss
from weighted_mtp_core.model.policy import make_policy
from weighted_mtp_core.model.targets import align_labels

V = 50
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2)),
}
LENGTHS = ((5, 9, 4), (7, 3))
POLICIES = [(name, head) for name in BASES for head in ("transformer", "linear")]


@functools.cache
def policy(name, head):
    torch.manual_seed(1)
    base = BASES[name]()
    for parameter in base.parameters():  # far from the initial scale, where every position looks alike
        torch.nn.init.normal_(parameter, std=0.3)
    made = make_policy(base, n_future=3, head_kind=head).eval()
    for parameter in made.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def documents():
    generator = np.random.default_rng(0)
    return [[generator.integers(0, V, size=length).tolist() for length in row] for row in LENGTHS]


def batch(rows):
    """Lay documents into rows, one after the other; their first two tokens are the prompt."""
    width = max(sum(map(len, row)) for row in rows)
    columns = {name: torch.zeros(len(rows), width, dtype=torch.long) for name in ("ids", "position")}
    document_BT = torch.full((len(rows), width), -1)
    for b, row in enumerate(rows):
        first = 0
        for number, document in enumerate(row):
            place = slice(first, first + len(document))
            columns["ids"][b, place] = torch.tensor(document)
            columns["position"][b, place] = torch.arange(len(document))
            document_BT[b, place] = number
            first = place.stop
    response_BT = (document_BT >= 0) & (columns["position"] >= 2)
    return Batch(
        ids_BT=columns["ids"],
        document_BT=document_BT,
        response_BT=response_BT,
        reward_BT=response_BT.float(),
        group_BT=document_BT,
        position_BT=columns["position"] if any(len(row) > 1 for row in rows) else None,
    )


def labels(one, n_future=3):
    return align_labels(
        one.ids_BT, document_BT=one.document_BT, response_BT=one.response_BT, n_future=n_future
    )


def losses(model, one):
    hidden_BTH = model.trunk_states(one.ids_BT, position_BT=one.position_BT)
    return token_losses(model, hidden_BTH, labels(one), position_BT=one.position_BT)


def cut(tensor, rows):
    """Return each document's part of a `[B, T, ...]` tensor."""
    found = []
    for b, row in enumerate(rows):
        ends = np.cumsum([len(document) for document in row])
        found += [tensor[b, end - len(document) : end] for end, document in zip(ends, row, strict=True)]
    return found


@pytest.fixture
def alone():
    return [batch([[document]]) for row in documents() for document in row]


@pytest.mark.parametrize(("name", "head"), POLICIES)
@torch.no_grad()
def test_a_packed_document_has_the_losses_that_it_has_alone(name, head, alone):
    rows = documents()
    packed = cut(losses(policy(name, head), batch(rows)), rows)

    for one, other in zip(alone, packed, strict=True):
        torch.testing.assert_close(other, losses(policy(name, head), one)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "head"), POLICIES)
@torch.no_grad()
def test_frozen_copies_see_the_same_documents(name, head, alone):
    model, rows = policy(name, head), documents()
    states, reference = model.frozen_trunk(), frozen_losses(model, None, load=None)
    for function in (states, reference):
        for one, other in zip(alone, cut(function(batch(rows)), rows), strict=True):
            torch.testing.assert_close(other, function(one)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "head"), POLICIES)
def test_gradients_of_packed_documents_are_those_of_all_of_them_alone(name, head, alone):
    model = policy(name, head)
    ones_K = torch.ones(3)

    def gradients(batches):
        model.zero_grad()
        for one in batches:
            weighted_mtp_loss(
                model,
                model.trunk_states(one.ids_BT, position_BT=one.position_BT),
                labels_BTK=labels(one),
                weight_BTK=None,
                normaliser_K=ones_K,
                head_share_K=ones_K,
                position_BT=one.position_BT,
            ).loss.backward()
        return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]

    for packed, apart in zip(gradients([batch(documents())]), gradients(alone), strict=True):
        torch.testing.assert_close(packed, apart, rtol=1e-3, atol=1e-4)
