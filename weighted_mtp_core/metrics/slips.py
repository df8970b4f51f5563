"""Find where each token is relative to the known mistakes (slips) of its response.

Shape letters: B batch rows, T positions, N pairs of a source and a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weighted_mtp_core.api import Batch, is_correct

PLACES = ("before_slip", "at_slip", "behind_slip")


def slips_of(batch: Batch) -> Tensor:
    """Return bool `[B, T]`, True for tokens that are mistakes according to `DataSource.oracle_weights`."""
    if batch.given_BT is None:
        return torch.zeros_like(batch.response_BT)
    return batch.response_BT & (batch.given_BT < 1)


def numbers_of_responses(document_BT: Tensor) -> Tensor:
    """Return the number of each token's document in the batch, int64 `[B, T]` in 0..B*T - 1.

    The number is arbitrary on padding.
    """
    rows, length = document_BT.shape
    row_B1 = torch.arange(rows, device=document_BT.device)[:, None]
    return row_B1 * length + document_BT.clamp(min=0)


def places_of(batch: Batch) -> Tensor:
    """Return the index in `PLACES` of each token of an incorrect response with a slip, int64 `[B, T]`.

    A token is before the first slip, at a slip, or after the first slip but not at a slip. Tokens outside of
    incorrect responses with a slip have the index -1.
    """
    wrong_BT = batch.response_BT & ~is_correct(batch.reward_BT)
    slip_BT = wrong_BT & slips_of(batch)
    never = slip_BT.shape[1]
    index_BT = torch.arange(never, device=slip_BT.device).expand_as(batch.document_BT)
    number_BT = numbers_of_responses(batch.document_BT)
    first_R = index_BT.new_full((number_BT.numel(),), never).scatter_reduce(
        0, number_BT.flatten(), index_BT.where(slip_BT, never).flatten(), "amin"
    )
    first_BT = first_R[number_BT]
    place_BT = torch.where(slip_BT, 1, torch.where(index_BT < first_BT, 0, 2))
    return place_BT.where(wrong_BT & (first_BT < never), -1)


def slip_metrics(weight_N: Tensor, place_N: Tensor) -> dict[str, Tensor]:
    """Return the mean weight of the pairs at each of `PLACES`; NaN for a place without pairs.

    Args:
        weight_N: The weight of each pair.
        place_N: The result of `places_of` for the target of each pair.
    """
    return {
        f"weight_{name}": weight_N.float().where(place_N == place, 0.0).sum() / (place_N == place).sum()
        for place, name in enumerate(PLACES)
    }
