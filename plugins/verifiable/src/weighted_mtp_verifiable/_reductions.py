"""Sums and means over documents, rows and masked entries, without a loop over tokens.

Shape letters: B batch rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it


def same_as_previous(document_BT: Tensor) -> Tensor:
    """Return the mask of tokens whose previous token belongs to the same document, bool `[B, T]`."""
    return F.pad(document_BT[:, 1:] == document_BT[:, :-1], (1, 0))


def discounted_sums(x_BT: Tensor, *, document_BT: Tensor, discount: float) -> Tensor:
    """Return for each token t the sum of `discount^l * x_{t+l}` over l = 0, 1, ... to the document's end.

    The sum S_t at token t satisfies the recurrence `S_t = x_t + c_t S_{t+1}`, where c_t is 0 at the last
    token of a document and otherwise the discount. The recurrence is solved by doubling the number of tokens
    in all sums log2(T) times (Hillis and Steele 1986). `benchmarks/advantages.py` measures the speed.

    Args:
        x_BT: The numbers x, floating-point and finite everywhere.
        document_BT: Number of the document within the row.
        discount: Factor per token.
    """
    sum_BT = x_BT.clone()
    # The product of c over `span` tokens.
    carry = discount * (document_BT[:, :-1] == document_BT[:, 1:]).to(x_BT.dtype)
    span = 1
    while span < x_BT.shape[1]:
        sum_BT[:, :-span] += carry * sum_BT[:, span:]
        carry = carry[:, :-span] * carry[:, span:]
        span *= 2
    return sum_BT


def document_sums(x_BT: Tensor, document_BT: Tensor) -> Tensor:
    """Return for each token the sum over its whole document."""
    rest_BT = discounted_sums(x_BT, document_BT=document_BT, discount=1.0)
    return rest_BT + sums_so_far(x_BT, document_BT) - x_BT


def sums_so_far(x_BT: Tensor, document_BT: Tensor) -> Tensor:
    """Return the same sums as `document_cumsum`, with deterministic operators only."""
    return discounted_sums(x_BT.flip(1), document_BT=document_BT.flip(1), discount=1.0).flip(1)


def document_cumsum(x_BT: Tensor, document_BT: Tensor) -> Tensor:
    """Return for each token the sum over its document up to and including the token."""
    if x_BT.is_cuda and torch.are_deterministic_algorithms_enabled():  # torch refuses `cumsum` in this mode
        return sums_so_far(x_BT, document_BT)
    total_BT = x_BT.cumsum(dim=1)
    index_T = torch.arange(x_BT.shape[1], device=x_BT.device)
    start_BT = (~same_as_previous(document_BT) * index_T).cummax(dim=1).values
    return total_BT - (total_BT - x_BT).gather(1, start_BT)


def remaining_response_tokens(response_BT: Tensor, document_BT: Tensor) -> Tensor:
    """Return the number of response tokens from each token to the end of its document, int64 `[B, T]`.

    The token itself is counted if it is a response token.
    """
    from_here_BT = _backward_cumulative(torch.cumsum, response_BT.long())
    is_end_BT = ~F.pad(same_as_previous(document_BT)[:, 1:], (0, 1))
    behind_BT = (from_here_BT - response_BT.long()).where(is_end_BT, 0)
    # The counts behind document ends never increase along a row. So the largest of these counts from a token
    # on is the count behind the end of the token's own document.
    return from_here_BT - _backward_cumulative(lambda x, dim: x.cummax(dim).values, behind_BT)


def _backward_cumulative(cumulative: Callable[[Tensor, int], Tensor], x_BT: Tensor) -> Tensor:
    return cumulative(x_BT.flip(1), 1).flip(1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of x where the mask is True; 0, with a gradient of 0, if the mask is all False."""
    return x.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def mean_of_row_means(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over rows of each row's masked mean, which is 0 if the row's mask is all False.

    If a batch is split into parts with equally many rows, the mean of the parts' results is the result of the
    batch. A mean over tokens does not have this property.
    """
    total_B = x_BT.where(mask_BT, 0.0).sum(dim=1)
    return (total_B / mask_BT.sum(dim=1).clamp(min=1)).mean()
