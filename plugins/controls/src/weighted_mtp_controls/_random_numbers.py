"""Random numbers as a pure function of (seed, step, document, position, head): a counter-based generator.

The numbers of a document do not depend on its place in the batch. A generator with a state would return
different numbers if documents were packed, if the batch were split over processes, or if the run were
resumed. The mixing function comes from splitmix64 (Steele, Lea and Flood 2014, figure 16).

Shape letters: B batch rows, T positions, K heads.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from weighted_mtp_core.api import StepView

_WORD = 1 << 64
_BITS = 52  # number of bits in the fraction of a float64
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(view: StepView, *, seed: int, heads: int) -> Tensor:
    """Return random float64 numbers in (0, 1), `[B, T, heads]`, on a device that supports float64."""
    numbers_BTK = random_integers(view, seed=seed, heads=heads)
    return (numbers_BTK.to(with_float64(numbers_BTK.device)).double() + 0.5) / (1 << _BITS)


def with_float64(device: torch.device) -> torch.device:
    """Return the device, or the CPU if the device does not support float64."""
    return torch.device("cpu") if device.type == "mps" else device


def random_integers(view: StepView, *, seed: int, heads: int) -> Tensor:
    """Return random int64 numbers from 0 to 2^52 - 1, `[B, T, heads]`.

    Args:
        view: The numbers depend on the step, on the token ids and on the boundaries of documents.
        seed: The numbers also depend on this seed.
        heads: Number of random numbers per token.
    """
    position_BT, document_BT = _positions_and_documents(view)
    words_BT = _mix(_mix(_mix(document_BT + _word(_GOLDEN * (view.step + 1))) + position_BT) ^ _key(seed))
    head_K = torch.arange(1, heads + 1, device=words_BT.device)
    return _shift(_mix(words_BT[..., None] + head_K * _word(_GOLDEN)), 64 - _BITS)


def _positions_and_documents(view: StepView) -> tuple[Tensor, Tensor]:
    """Return each token's position in its document, and a hash of the document's tokens, int64."""
    document_BT = view.document_BT
    index_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    starts_BT = torch.ones_like(document_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    position_BT = index_T - (starts_BT * index_T).cummax(dim=1).values
    token_BT = _mix(view.ids_BT + _word(_GOLDEN) * (position_BT + 1))
    # A row of T tokens contains at most T documents, so a row of T sums has space for a sum per document.
    slot_BT = document_BT.clamp(min=0)
    sum_BT = torch.zeros_like(token_BT).scatter_add(1, slot_BT, token_BT.where(document_BT >= 0, 0))
    return position_BT, sum_BT.gather(1, slot_BT)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _word(_FIRST)
    x = (x ^ _shift(x, 27)) * _word(_SECOND)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill the top bits with zeros; torch's own shift of int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _key(seed: int) -> int:
    """Return a hash of the seed, so that heads with different seeds do not draw the same numbers."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), signed=True)


def _word(number: int) -> int:
    """Return the int64 whose bits are the 64 lowest bits of `number`."""
    number %= _WORD
    return number - _WORD if number >= _WORD // 2 else number
