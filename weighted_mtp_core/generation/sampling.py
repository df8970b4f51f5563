"""Sample tokens, and accept or replace drafted tokens without changing the distribution of the text.

The caller passes uniform random numbers from a separate generator for each row, so a row's tokens do not
depend on other rows.

Shape letters: R rows, D drafted tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(logits: Tensor, *, temperature: float) -> Tensor:
    """Return float32 probabilities over the last dimension; the temperature must be > 0."""
    return torch.softmax(logits.float() / temperature, dim=-1)


def draw(probability: Tensor, uniform: Tensor) -> Tensor:
    """Draw tokens by inverting cumulative distributions.

    Args:
        probability: Distributions, `[..., V]`.
        uniform: Uniform random numbers in [0, 1), `[...]`.

    Returns:
        The tokens, int64 `[...]`.
    """
    if probability.is_cuda and torch.are_deterministic_algorithms_enabled():
        cumulative = whole_cumulative(probability)
    else:
        cumulative = probability.cumsum(dim=-1)
    point = (uniform * cumulative[..., -1])[..., None]
    token = torch.searchsorted(cumulative, point, right=True)[..., 0]
    return token.clamp(max=probability.shape[-1] - 1)


def whole_cumulative(probability: Tensor) -> Tensor:
    """Return the cumulative distribution, float64, of probabilities rounded down to multiples of 2**-40.

    Sums of multiples of 2**-40 are exact and therefore deterministic; in its deterministic mode, torch
    refuses `cumsum` of floats on CUDA devices.
    """
    return (probability.double() * 2.0**40).long().cumsum(dim=-1).double() * 2.0**-40


def accept_greedy(draft_RD: Tensor, best_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Accept the drafted tokens before the first draft that differs from the likeliest token.

    Args:
        draft_RD: Drafted tokens, int64.
        best_RT: The likeliest tokens, int64 `[R, D + 1]`; the last one is for the position after all drafts.

    Returns:
        The number of accepted drafts and the token that follows them, both int64 `[R]`.
    """
    count_R = (draft_RD == best_RT[:, :-1]).long().cumprod(dim=1).sum(dim=1)
    return count_R, best_RT.gather(1, count_R[:, None])[:, 0]


def accept(
    draft_RD: Tensor, draft_RDV: Tensor, target_RDV: Tensor, uniform_RD: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept drafted tokens at random, and return the distribution of the token that follows them.

    Draft i is accepted with probability `min(1, p_i / q_i)`, where p_i and q_i are its probabilities under
    the target distribution p and the draft distribution q. The first rejected draft is replaced with a sample
    from the normalised `max(p - q, 0)`, where p and q are its target and draft distributions (Leviathan et
    al. 2023, algorithm 1). If all drafts are accepted, the next token has the target distribution at its
    position. The resulting tokens have the target distribution.

    Args:
        draft_RD: Drafted tokens, int64.
        draft_RDV: The distribution q from which each draft was drawn.
        target_RDV: The target distributions p, `[R, D + 1, V]`; the last one is for the token after all
            drafts.
        uniform_RD: Uniform random numbers in [0, 1).

    Returns:
        The number of accepted drafts, int64 `[R]`, and the distribution of the next token, `[R, V]`, which is
        not normalised.
    """
    rows, drafts = draft_RD.shape
    p_RD = target_RDV[:, :drafts].gather(2, draft_RD[:, :, None])[:, :, 0]
    q_RD = draft_RDV.gather(2, draft_RD[:, :, None])[:, :, 0]
    accepted_RD = uniform_RD * q_RD < p_RD
    count_R = accepted_RD.long().cumprod(dim=1).sum(dim=1)
    row_R = torch.arange(rows, device=draft_RD.device)
    target_RV = target_RDV[row_R, count_R]
    padded_RDV = torch.cat([draft_RDV, torch.zeros_like(target_RDV[:, -1:])], dim=1)
    rest_RV = (target_RV - padded_RDV[row_R, count_R]).clamp(min=0)
    # If q equals p up to rounding, max(p - q, 0) may be 0 everywhere; then p itself is correct.
    is_left_R1 = rest_RV.sum(dim=-1, keepdim=True) > 0
    return count_R, torch.where(is_left_R1, rest_RV, target_RV)
