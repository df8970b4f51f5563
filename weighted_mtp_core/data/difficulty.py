"""How difficult a problem is for those who tried it: the share of right responses, in five bins."""

from __future__ import annotations

BINS = ("0-20 %", "20-40 %", "40-60 %", "60-80 %", "80-100 %")
"""Shares of right responses, hard problems first; a bin holds its lower bound, the last one 100 % too."""


def bin_of(right_share: float) -> int:
    """Return the number of the bin of a share of right responses."""
    return min(int(right_share * len(BINS)), len(BINS) - 1)
