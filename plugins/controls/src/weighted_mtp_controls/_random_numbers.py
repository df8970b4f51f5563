"""Random numbers that are a function of (seed, step, document, position, head), and of nothing else.

A generator would give other numbers when rows are packed, split over processes or resumed. These are the same
wherever a document lies. The mixing is that of splitmix64 (Steele, Lea and Flood 2014, figure 16).

Shape letters: B batch rows, T positions, K heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from weighted_mtp_core.api import StepView

_WORD = 1 << 64
_BITS = 52  # of a float64's fraction
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(view: StepView, *, seed: int, heads: int) -> Tensor:
    """Return `whole` numbers as float64 in (0, 1), `[B, T, heads]`, on a device that has float64."""
    numbers_BTK = whole(view, seed=seed, heads=heads)
    return (numbers_BTK.to(with_float64(numbers_BTK.device)).double() + 0.5) / (1 << _BITS)


def with_float64(device: torch.device) -> torch.device:
    """Return the device, or the CPU where it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def whole(view: StepView, *, seed: int, heads: int) -> Tensor:
    """Return int64 numbers from 0 to 2^52 - 1, `[B, T, heads]`.

    Args:
        view: Its document numbers, ids and step count.
        seed: Of the component.
        heads: Numbers a token.
    """
    position_BT, document_BT = _places(view)
    words_BT = _mix(_mix(document_BT + _word(_GOLDEN * (view.step + 1))) + position_BT) + _word(
        _GOLDEN * seed
    )
    head_K = torch.arange(1, heads + 1, device=words_BT.device)
    return _shift(_mix(words_BT[..., None] + head_K * _word(_GOLDEN)), 64 - _BITS)


def _places(view: StepView) -> tuple[Tensor, Tensor]:
    """Return each token's position in its document, and a number that is the document's own, int64."""
    document_BT = view.document_BT
    index_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    starts_BT = torch.ones_like(document_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    position_BT = index_T - (starts_BT * index_T).cummax(dim=1).values
    token_BT = _mix(view.ids_BT + _word(_GOLDEN) * (position_BT + 1))
    # A row of T tokens has at most T documents, so sums of documents fit into a row.
    slot_BT = document_BT.clamp(min=0)
    sum_BT = torch.zeros_like(token_BT).scatter_add(1, slot_BT, token_BT.where(document_BT >= 0, 0))
    return position_BT, sum_BT.gather(1, slot_BT)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _word(_FIRST)
    x = (x ^ _shift(x, 27)) * _word(_SECOND)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right, zeros coming in: int64 would bring copies of its sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _word(number: int) -> int:
    """Return the int64 with the same low 64 bits."""
    number %= _WORD
    return number - _WORD if number >= _WORD // 2 else number
