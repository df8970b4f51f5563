"""TD errors and advantages of tokens, for whole batches at once.

A response is an episode: the state before token t is the prefix that ends at t - 1, the action is token t,
and the only reward R comes with the last response token, after which the value is 0.

Shape letters: B batch rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it


def td_errors(
    value_BT: Tensor, reward_BT: Tensor, *, document_BT: Tensor, response_BT: Tensor, gamma: float
) -> Tensor:
    """Return `delta_t = r_t + gamma * V_t - V_{t-1}`, the TD error of each token (Sutton 1988).

    Args:
        value_BT: V_t, the value of the prefix that ends at token t; finite.
        reward_BT: The reward R of the response, on each of its tokens.
        document_BT: Number of the document within the row; -1 on padding.
        response_BT: True on response tokens.
        gamma: Discount a token.

    Returns:
        `[B, T]`, 0 behind a document's last response token and on padding. Tokens before the response have
        errors too, and so do those between two parts of one, so that sums over a document telescope. A
        document that begins with its response has no value before it: 0 stands there.
    """
    remaining_BT = remaining(response_BT, document_BT)
    last_BT = response_BT & (remaining_BT == 1)
    before_BT = F.pad(value_BT[:, :-1], (1, 0)).where(same_as_previous(document_BT), 0.0)
    after_BT = reward_BT.where(last_BT, gamma * value_BT)
    return (after_BT - before_BT).where(remaining_BT >= 1, 0.0)


def advantages(delta_BT: Tensor, *, document_BT: Tensor, gamma: float, lam: float) -> Tensor:
    """Return `A_t = sum_l (gamma * lam)^l * delta_{t+l}` within each document.

    This is generalised advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16).
    With `gamma = lam = 1` it telescopes to `R - V_{t-1}`.
    """
    return discounted_sums(delta_BT, document_BT=document_BT, discount=gamma * lam)


def remaining(response_BT: Tensor, document_BT: Tensor) -> Tensor:
    """Return how many response tokens the rest of each token's document has, itself included, as int64."""
    from_here_BT = _backward_cumulative(torch.cumsum, response_BT.long())
    is_end_BT = ~F.pad(same_as_previous(document_BT)[:, 1:], (0, 1))
    behind_BT = (from_here_BT - response_BT.long()).where(is_end_BT, 0)
    # Counts fall along a row: of the ends that follow, the nearest, the document's own, has the largest.
    return from_here_BT - _backward_cumulative(lambda x, dim: x.cummax(dim).values, behind_BT)


def _backward_cumulative(cumulative: Callable[[Tensor, int], Tensor], x_BT: Tensor) -> Tensor:
    return cumulative(x_BT.flip(1), 1).flip(1)


def document_sums(x_BT: Tensor, document_BT: Tensor) -> Tensor:
    """Return for each token the sum over all of its document."""
    rest_BT = discounted_sums(x_BT, document_BT=document_BT, discount=1.0)
    so_far_BT = discounted_sums(x_BT.flip(1), document_BT=document_BT.flip(1), discount=1.0).flip(1)
    return rest_BT + so_far_BT - x_BT


def same_as_previous(document_BT: Tensor) -> Tensor:
    """Return True where the token before belongs to the same document."""
    return F.pad(document_BT[:, 1:] == document_BT[:, :-1], (1, 0))


def discounted_sums(x_BT: Tensor, *, document_BT: Tensor, discount: float) -> Tensor:
    """Return `sum_l discount^l * x_{t+l}` over the rest of each token's document.

    The recurrence `S_t = x_t + c_t S_{t+1}`, with c = 0 at a document's end, is solved by doubling its span
    log2(T) times (Hillis and Steele 1986): no loop over tokens (`benchmarks/advantages.py`).

    Args:
        x_BT: float32 and finite, also where nothing is asked for.
        document_BT: Number of the document within the row.
        discount: A token.
    """
    sum_BT = x_BT.clone()
    carry = discount * (document_BT[:, :-1] == document_BT[:, 1:]).to(x_BT.dtype)  # c over `span` tokens
    span = 1
    while span < x_BT.shape[1]:
        sum_BT[:, :-span] += carry * sum_BT[:, span:]
        carry = carry[:, :-span] * carry[:, span:]
        span *= 2
    return sum_BT
