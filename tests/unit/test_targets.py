"""Which head predicts which token: labels and weights, against known answers and loops."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.api.tensors import align_weights, gather_by_target
from weighted_mtp_core.model.targets import IGNORED, align_labels, target_mask


def one_row(length, *, prompt=0):
    """Return ids 0, 1, ... of one document, document numbers and response mask."""
    position_T = torch.arange(length)
    return position_T[None], torch.zeros(1, length, dtype=torch.long), (position_T >= prompt)[None]


def labels_of(ids_BT, document_BT, response_BT, n_future):
    return align_labels(ids_BT, document_BT=document_BT, response_BT=response_BT, n_future=n_future)


@st.composite
def batches(draw):
    """Draw rows of documents with random response tokens, and padding after them; K; and a generator."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    document_BT = (torch.rand(shape, generator=generator) < 0.3).long().cumsum(dim=1)
    padding_B = torch.randint(0, shape[1] + 1, (shape[0], 1), generator=generator)
    document_BT[torch.arange(shape[1]) >= shape[1] - padding_B] = -1
    response_BT = (torch.rand(shape, generator=generator) < 0.7) & (document_BT >= 0)
    ids_BT = torch.randint(0, 50, shape, generator=generator)
    return ids_BT, document_BT, response_BT, draw(st.integers(1, 11)), generator


def naive_pairs(document_BT, response_BT, n_future):
    """Yield every counted pair as (row, source, target, head), by the definition."""
    rows, length = document_BT.shape
    for b in range(rows):
        for t in range(length):
            for k in range(1, n_future + 1):
                if (
                    t + k < length
                    and response_BT[b, t + k]
                    and document_BT[b, t] == document_BT[b, t + k]
                    and document_BT[b, t] >= 0
                ):
                    yield b, t, t + k, k


# ------------------------------------------------------------------ known answers


def test_head_k_of_ten_tokens_counts_ten_minus_k_pairs():
    labels_BTK = labels_of(*one_row(10), 4)

    assert target_mask(labels_BTK).sum(dim=(0, 1)).tolist() == [9, 8, 7, 6]
    assert labels_BTK[0, 0].tolist() == [1, 2, 3, 4]
    assert labels_BTK[0, 7].tolist() == [8, 9, IGNORED, IGNORED]


def test_no_target_lies_across_a_packing_boundary():
    a, b = (0, 1, 2), (10, 11, 12, 13)
    ids_BT = torch.tensor([[*a, *b]])
    document_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])

    labels_BTK = labels_of(ids_BT, document_BT, torch.ones_like(ids_BT, dtype=torch.bool), 3)

    nothing = IGNORED
    assert labels_BTK[0].T.tolist() == [
        [1, 2, nothing, 11, 12, 13, nothing],
        [2, nothing, nothing, 12, 13, nothing, nothing],
        [nothing, nothing, nothing, 13, nothing, nothing, nothing],
    ]


def test_sources_in_the_prompt_count():
    target_BTK = target_mask(labels_of(*one_row(8, prompt=3), 3))

    assert target_BTK.sum(dim=(0, 1)).tolist() == [5, 5, 5]
    assert target_BTK[0, 0].tolist() == [False, False, True]


def test_padding_is_neither_source_nor_target():
    ids_BT, document_BT, response_BT = one_row(6)
    document_BT[0, 4:] = -1

    labels_BTK = labels_of(ids_BT, document_BT, response_BT, 2)

    assert labels_BTK[0, :, 0].tolist() == [1, 2, 3, IGNORED, IGNORED, IGNORED]


def test_a_row_shorter_than_the_horizon_has_the_pairs_that_fit():
    assert target_mask(labels_of(*one_row(3), 5)).sum(dim=(0, 1)).tolist() == [2, 1, 0, 0, 0]
    assert not target_mask(labels_of(*one_row(1), 2)).any()


def test_a_token_has_one_weight_for_all_heads():
    target_BTK = target_mask(labels_of(*one_row(4), 2))

    weight_BTK = align_weights(torch.tensor([[9.0, 0.1, 0.2, 0.3]]), target_BTK)

    expected = torch.tensor([[[0.1, 0.2], [0.2, 0.3], [0.3, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(weight_BTK, expected, rtol=0, atol=0)


# ------------------------------------------------------------------ laws


@given(batches())
def test_labels_are_those_of_a_triple_loop(batch):
    ids_BT, document_BT, response_BT, n_future, _ = batch
    expected = torch.full((*ids_BT.shape, n_future), IGNORED)
    for b, t, target, k in naive_pairs(document_BT, response_BT, n_future):
        expected[b, t, k - 1] = ids_BT[b, target]

    assert torch.equal(labels_of(ids_BT, document_BT, response_BT, n_future), expected)


@given(batches())
def test_weights_of_tokens_are_those_of_a_triple_loop(batch):
    ids_BT, document_BT, response_BT, n_future, generator = batch
    weight_BT = torch.rand(ids_BT.shape, generator=generator)
    expected = torch.zeros(*ids_BT.shape, n_future)
    for b, t, target, k in naive_pairs(document_BT, response_BT, n_future):
        expected[b, t, k - 1] = weight_BT[b, target]

    target_BTK = target_mask(labels_of(ids_BT, document_BT, response_BT, n_future))

    assert torch.equal(align_weights(weight_BT, target_BTK), expected)


@given(batches())
def test_weights_of_pairs_stay_where_they_are_and_are_0_off_the_targets(batch):
    ids_BT, document_BT, response_BT, n_future, generator = batch
    weight_BTK = torch.rand(*ids_BT.shape, n_future, generator=generator)
    expected = torch.zeros_like(weight_BTK)
    for b, t, _, k in naive_pairs(document_BT, response_BT, n_future):
        expected[b, t, k - 1] = weight_BTK[b, t, k - 1]

    target_BTK = target_mask(labels_of(ids_BT, document_BT, response_BT, n_future))

    assert torch.equal(align_weights(weight_BTK, target_BTK), expected)


@given(batches())
def test_values_of_pairs_go_to_the_target_as_in_a_triple_loop(batch):
    ids_BT, document_BT, response_BT, n_future, generator = batch
    x_BTK = torch.rand(*ids_BT.shape, n_future, generator=generator)
    expected = torch.zeros_like(x_BTK)
    for b, t, target, k in naive_pairs(document_BT, response_BT, n_future):
        expected[b, target, k - 1] = x_BTK[b, t, k - 1]

    target_BTK = target_mask(labels_of(ids_BT, document_BT, response_BT, n_future))

    assert torch.equal(gather_by_target(x_BTK, target_BTK), expected)


@given(batches())
def test_nan_off_the_targets_has_no_effect(batch):
    ids_BT, document_BT, response_BT, n_future, _ = batch
    target_BTK = target_mask(labels_of(ids_BT, document_BT, response_BT, n_future))
    poisoned_BTK = torch.where(target_BTK, 1.0, torch.nan)

    assert torch.isfinite(align_weights(poisoned_BTK, target_BTK)).all()
    assert torch.isfinite(gather_by_target(poisoned_BTK, target_BTK)).all()
