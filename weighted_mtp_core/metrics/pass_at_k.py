"""Estimates the probability that at least one of k samples solves a problem."""

from __future__ import annotations

import math


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate `1 - C(n - c, k) / C(n, k)` with binomials C (Chen et al. 2021, eq. 1).

    Args:
        n: Number of samples that were drawn.
        c: Number of samples that passed.
        k: Number of samples that a user would try; at most n.

    Raises:
        ValueError: c is not between 0 and n, or k is not between 1 and n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} passed among {n} samples is not defined")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
