"""Choose tokens: greedy or sampled, and keep or replace drafted ones without changing the distribution.

All randomness comes in as uniform numbers, so that what a row gets depends on its own stream alone.

Shape letters: R rows, D drafted tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(logits: Tensor, *, temperature: float) -> Tensor:
    """Return float32 probabilities over the last dimension; temperature 0 puts all on the likeliest token."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    return torch.softmax(logits.float() / temperature, dim=-1)


def draw(probability_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Return a token of each row by inverting its cumulative distribution, int64 `[R]`."""
    cumulative_RV = probability_RV.cumsum(dim=-1)
    point_R1 = (uniform_R * cumulative_RV[:, -1])[:, None]
    token_R = torch.searchsorted(cumulative_RV, point_R1, right=True)[:, 0]
    return token_R.clamp(max=probability_RV.shape[-1] - 1)


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
