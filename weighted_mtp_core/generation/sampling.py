"""Choose tokens: greedy or sampled, and keep or replace drafted ones without changing the distribution.

All randomness comes in as uniform numbers, so that what a row gets depends on its own stream alone.

Shape letters: R rows, D drafted tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(logits: Tensor, *, temperature: float) -> Tensor:
    """Return float32 probabilities over the last dimension, for a temperature above 0."""
    return torch.softmax(logits.float() / temperature, dim=-1)


def draw(probability: Tensor, uniform: Tensor) -> Tensor:
    """Return tokens by inverting cumulative distributions: int64 `[...]`, of `[..., V]` and `[...]`."""
    cumulative = probability.cumsum(dim=-1)
    point = (uniform * cumulative[..., -1])[..., None]
    token = torch.searchsorted(cumulative, point, right=True)[..., 0]
    return token.clamp(max=probability.shape[-1] - 1)


def accept_greedy(draft_RD: Tensor, best_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Decide how many drafted tokens stay where each should be the likeliest, and which token follows them.

    Args:
        draft_RD: Drafted tokens, int64.
        best_RT: `[R, D + 1]`, the likeliest tokens; the last for the token after all drafts.

    Returns:
        How many drafts stay and the token after them, both int64 `[R]`.
    """
    count_R = (draft_RD == best_RT[:, :-1]).long().cumprod(dim=1).sum(dim=1)
    return count_R, best_RT.gather(1, count_R[:, None])[:, 0]


def accept(
    draft_RD: Tensor, draft_RDV: Tensor, target_RDV: Tensor, uniform_RD: Tensor
) -> tuple[Tensor, Tensor]:
    """Decide how many drafted tokens stay, and from what distribution the token after them comes.

    Draft i stays with probability `min(1, p_i / q_i)`; the first that does not is replaced by a draw from
    `max(p_i - q_i, 0)`, normalised (Leviathan et al. 2023, algorithm 1). What results is distributed as p.

    Args:
        draft_RD: Drafted tokens, int64.
        draft_RDV: What each was drawn from, q.
        target_RDV: `[R, D + 1, V]`, what it should be distributed as, p; the last for the token after all.
        uniform_RD: Uniform numbers in [0, 1).

    Returns:
        How many drafts stay, int64 `[R]`, and the distribution of the next token, `[R, V]`.
    """
    rows, drafts = draft_RD.shape
    p_RD = target_RDV[:, :drafts].gather(2, draft_RD[:, :, None])[:, :, 0]
    q_RD = draft_RDV.gather(2, draft_RD[:, :, None])[:, :, 0]
    stays_RD = uniform_RD * q_RD < p_RD
    count_R = stays_RD.long().cumprod(dim=1).sum(dim=1)
    row_R = torch.arange(rows, device=draft_RD.device)
    target_RV = target_RDV[row_R, count_R]
    padded_RDV = torch.cat([draft_RDV, torch.zeros_like(target_RDV[:, -1:])], dim=1)
    rest_RV = (target_RV - padded_RDV[row_R, count_R]).clamp(min=0)
    # Where q is p up to rounding, a draft may be refused with nothing left over: p itself is then right.
    is_left_R1 = rest_RV.sum(dim=-1, keepdim=True) > 0
    return count_R, torch.where(is_left_R1, rest_RV, target_RV)
