"""What a view helps with: laying what belongs to targets onto pairs, and back."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.api import StepView
from weighted_mtp_core.model.targets import align_labels, target_mask


def view(document, response, *, n_future):
    document_BT = torch.tensor([document])
    response_BT = torch.tensor([response], dtype=torch.bool)
    ids_BT = torch.zeros_like(document_BT)
    labels_BTK = align_labels(ids_BT, document_BT=document_BT, response_BT=response_BT, n_future=n_future)
    return StepView(
        ids_BT=ids_BT,
        document_BT=document_BT,
        response_BT=response_BT,
        target_BTK=target_mask(labels_BTK),
        n_future=n_future,
        step=0,
        training=True,
    )


# A document of a prompt token and two response tokens; another of one prompt and one response token.
TWO = view([0, 0, 0, 1, 1], [0, 1, 1, 0, 1], n_future=2)


def test_what_belongs_to_targets_is_laid_onto_pairs():
    pairs_BTK = TWO.to_pairs(torch.tensor([[10.0, 11.0, 12.0, 13.0, 14.0]]))

    assert pairs_BTK.tolist() == [[[11, 12], [12, 0], [0, 0], [14, 0], [0, 0]]]


def test_what_belongs_to_pairs_is_laid_onto_targets():
    pairs_BTK = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 9.0]]])

    # Token 1 is predicted by head 1 from 0; token 2 by head 1 from 1 and by head 2 from 0; token 4 from 3.
    assert TWO.to_targets(pairs_BTK).tolist() == [[[0, 0], [1, 0], [3, 2], [0, 0], [7, 0]]]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_there_and_back_keeps_what_counts(tokens, n_future, seed):
    tokens = sorted(tokens, key=lambda token: token[0])
    seen = view([document for document, _ in tokens], [answer for _, answer in tokens], n_future=n_future)
    x_BT = torch.rand(1, len(tokens), generator=torch.Generator().manual_seed(seed))

    back_BTK = seen.to_targets(seen.to_pairs(x_BT))
    reached_BTK = seen.to_targets(seen.target_BTK.float()) > 0

    assert torch.equal(back_BTK, x_BT[:, :, None].expand_as(back_BTK).where(reached_BTK, 0.0))
