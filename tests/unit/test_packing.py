"""Documents that share a row do not affect each other: losses and gradients are those of each alone."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from weighted_mtp_core.api import Batch, WmtpError
from weighted_mtp_core.data import samplers
from weighted_mtp_core.data.batches import collate_packed, split_rows
from weighted_mtp_core.data.samplers import PackedSampler, first_fit
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.model.language_model import LanguageModel, frozen_losses
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.loss import weighted_mtp_loss
from weighted_mtp_core.model.packing_probe import check_packing
from weighted_mtp_core.model.pair_predictions import PairPredictions
from weighted_mtp_core.model.targets import align_labels
from weighted_mtp_core.model.trunk import frozen_trunk

V = 50
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2)),
}
LENGTHS = ((5, 9, 4), (7, 3))
HEADS = {
    "parallel": {"head_kind": "parallel"},
    "medusa": {"head_kind": "medusa"},
    "sequential": {"head_kind": "sequential"},
    "sequential for vllm": {"head_kind": "sequential", "shared": True, "serve": "vllm"},
}
POLICIES = [(name, head) for name in BASES for head in HEADS]


@functools.cache
def policy(name, head):
    torch.manual_seed(1)
    base = BASES[name]()
    for parameter in base.parameters():  # far from the initial scale, at which all positions are alike
        torch.nn.init.normal_(parameter, std=0.3)
    made = make_policy(base, n_future=3, **HEADS[head]).eval()
    for parameter in made.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def documents():
    generator = np.random.default_rng(0)
    return [[generator.integers(0, V, size=length).tolist() for length in row] for row in LENGTHS]


def batch(rows):
    """Pack documents into rows; their first two tokens are the prompt."""
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
    return PairPredictions(
        model, hidden_BTH, labels(one), ids_BT=one.ids_BT, position_BT=one.position_BT
    ).losses()


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
def test_a_packed_document_has_the_same_losses_as_alone(name, head, alone):
    rows = documents()
    packed = cut(losses(policy(name, head), batch(rows)), rows)

    for one, other in zip(alone, packed, strict=True):
        torch.testing.assert_close(other, losses(policy(name, head), one)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "head"), POLICIES)
@torch.no_grad()
def test_frozen_copies_keep_documents_apart(name, head, alone):
    model, rows = policy(name, head), documents()
    states, reference = frozen_trunk(model), frozen_losses(LanguageModel.copy_of(model))
    for function in (states, reference):
        for one, other in zip(alone, cut(function(batch(rows)), rows), strict=True):
            torch.testing.assert_close(other, function(one)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "head"), POLICIES)
def test_gradients_of_packed_documents_are_the_sum_of_those_alone(name, head, alone):
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
                ids_BT=one.ids_BT,
                position_BT=one.position_BT,
            )
        return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]

    for packed, apart in zip(gradients([batch(documents())]), gradients(alone), strict=True):
        torch.testing.assert_close(packed, apart, rtol=1e-3, atol=1e-4)


def test_a_model_that_mixes_documents_is_refused():
    class Mixing(torch.nn.Module):
        """A trunk that ignores positions."""

        def __init__(self, trunk):
            super().__init__()
            self.trunk = trunk

        def forward(self, *, position_ids, **arguments):
            del position_ids
            return self.trunk(**arguments)

    torch.manual_seed(0)
    model = make_policy(BASES["llama"](), n_future=2, head_kind="medusa")
    check_packing(model)
    model.trunk = Mixing(model.trunk)

    with pytest.raises(WmtpError) as caught:
        check_packing(model)

    assert str(caught.value).startswith("a `llama` model mixes documents that share a row (states differ by ")
    assert caught.value.hint == 'set `data.packing = "none"`: documents are then grouped by length'


@pytest.mark.parametrize(("name", "head"), POLICIES)
def test_models_that_keep_documents_apart_are_accepted(name, head):
    check_packing(policy(name, head))


# ------------------------------------------------------------------ which documents share a row


def draw(sampler, documents):
    """Return batches that together contain at least `documents` documents."""
    batches, seen = [], 0
    while seen < documents:
        batches.append(sampler.rows(len(batches)))
        seen += sum(map(len, batches[-1]))
    return batches


def naive_first_fit(lengths, room):
    rows = []
    for number, length in enumerate(lengths):
        for row in rows:
            if sum(lengths[i] for i in row) + length <= room:
                row.append(number)
                break
        else:
            rows.append([number])
    return rows


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), room=st.integers(30, 70))
def test_each_document_goes_into_the_first_row_that_it_fits(lengths, room):
    rows = first_fit(np.asarray(lengths), row_tokens=room)

    assert [row.tolist() for row in rows] == naive_first_fit(lengths, room)


def test_a_document_longer_than_a_row_is_an_error():
    with pytest.raises(WmtpError, match="a document of 9 tokens does not fit into a row of 8"):
        first_fit(np.asarray([3, 9]), row_tokens=8)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=150),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 3),
    block=st.sampled_from([7, 50, 8192]),
)
def test_an_epoch_of_rows_holds_every_document_exactly_once(lengths, batch_size, seed, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "_PACKED_DOCUMENTS", block)
        lengths = np.asarray(lengths)
        sampler = PackedSampler(lengths, row_tokens=40, batch_size=batch_size, seed=seed)
        batches = draw(sampler, 2 * len(lengths))
        drawn = [int(d) for batch in batches for row in batch for d in row]

        assert sorted(drawn[: len(lengths)]) == sorted(drawn[len(lengths) :]) == list(range(len(lengths)))
        assert all(lengths[row].sum() <= 40 for batch in batches for row in batch)
        assert all(1 <= len(batch) <= batch_size for batch in batches)

        later = PackedSampler(lengths, row_tokens=40, batch_size=batch_size, seed=seed)
        for step in (len(batches) - 1, 0, len(batches) // 2):
            for one, other in zip(later.rows(step), batches[step], strict=True):
                assert np.array_equal(one, other)


def test_epochs_and_seeds_differ_in_rows():
    lengths = np.full(64, 10)
    first, other = (PackedSampler(lengths, row_tokens=640, batch_size=1, seed=seed) for seed in (0, 1))

    assert not np.array_equal(first.rows(0)[0], first.rows(1)[0])
    assert not np.array_equal(first.rows(0)[0], other.rows(0)[0])


@pytest.mark.parametrize("variants", [1, 4, 20])
def test_packing_leaves_hardly_any_padding_on_humaneval_lengths(variants, humaneval_characters):
    lengths = np.tile((np.asarray(humaneval_characters) / 3.2).astype(np.int64) + 1, variants)
    sampler = PackedSampler(lengths, row_tokens=2048, batch_size=8, seed=0)
    filled = [[lengths[row].sum() for row in batch] for batch in draw(sampler, len(lengths))]
    computed = sum(len(batch) * max(batch) for batch in filled)

    assert computed / lengths.sum() <= 1.02


# ------------------------------------------------------------------ rows as tensors


def test_a_packed_batch_numbers_documents_and_restarts_positions():
    tokens = TokenSet(
        ids_N=np.arange(10, 22),
        start_D1=np.asarray([0, 3, 7, 12]),
        prompt_D=np.asarray([2, 1, 3]),
        reward_D=np.asarray([1.0, 0.5, 1.0], dtype=np.float32),
        problem_D=np.asarray([4, 9, 4]),
        example_ids=("a", "b", "c"),
    )
    one = collate_packed(tokens, [np.asarray([2, 0]), np.asarray([1])], device=torch.device("cpu"))

    assert one.ids_BT.tolist() == [[17, 18, 19, 20, 21, 10, 11, 12], [13, 14, 15, 16, 0, 0, 0, 0]]
    assert one.document_BT.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1, -1, -1]]
    assert one.position_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 0, 0, 0]]
    assert one.response_BT.int().tolist() == [[0, 0, 0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 0, 0, 0, 0]]
    assert one.reward_BT.tolist() == [[0, 0, 0, 1, 1, 0, 0, 1], [0, 0.5, 0.5, 0.5, 0, 0, 0, 0]]
    assert one.group_BT.tolist() == [[0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, -1, -1, -1, -1]]
    assert one.example_ids == ("c + a", "b")
    assert one.names == (("c", "a"), ("b",))
    assert [part.position_BT.tolist() for part in split_rows(one, 2)] == [
        one.position_BT[:1].tolist(),
        one.position_BT[1:].tolist(),
    ]
