"""Tests whether a critic separates correct from incorrect responses better than chance.

Shape letters: D responses, P problems.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Ints = NDArray[np.int64]

LEVEL = 0.025
"""Largest p-value that counts as better than chance; this share of critics without information passes."""

PROBLEMS_NEEDED = 6
"""Fewest problems with a correct response, and fewest problems with an incorrect one, that the test needs.

The smallest p-value with n problems is about 1 / 2^n, which is less than `LEVEL` for n >= 6.
"""

_FLIPS = 3999  # random sign choices; the standard error of a p-value at `LEVEL` is a tenth of the p-value
_SIGNS_AT_ONCE = 1 << 22


def problems_by_outcome(correct_D: Flags, problem_D: Ints) -> tuple[int, int]:
    """Return the number of problems with a correct response, and of problems with an incorrect one."""
    return len(np.unique(problem_D[correct_D])), len(np.unique(problem_D[~correct_D]))


def chance_p_value(value_D: Floats, correct_D: Flags, problem_D: Ints) -> float:
    """Return the one-sided p-value of a sign-flip test over problems, from seeded random signs.

    The AUC minus 0.5 is proportional to the sum over all responses of (correct - mean) * (rank - mean rank),
    where correct is 0 or 1, mean is the mean of correct, and rank is the rank of the response's value. If the
    values carry no information about correctness, each problem's part of the sum has either sign with equal
    probability, even if the responses to the problem depend on each other. The observed sum is multiplied by
    (P - 1) / P for P problems, because the means of correctness and rank are estimates: without this factor,
    about 3 % of critics without information pass on 12 problems.

    Args:
        value_D: The value of each response.
        correct_D: bool, True for correct responses.
        problem_D: The number of each response's problem.
    """
    from scipy.stats import rankdata

    rank_D = rankdata(value_D)
    _, inverse_D = np.unique(problem_D, return_inverse=True)
    sum_P = np.bincount(inverse_D, (correct_D - correct_D.mean()) * (rank_D - rank_D.mean()))
    # Sums of the same numbers in another order differ in the last digits.
    least = sum_P.sum() * (1 - 1 / len(sum_P)) - 1e-9 * np.abs(sum_P).sum()
    generator, reached = np.random.default_rng(0), 0
    rows = max(_SIGNS_AT_ONCE // len(sum_P), 1)
    for first in range(0, _FLIPS, rows):
        shape = (min(rows, _FLIPS - first), len(sum_P))
        signs = generator.integers(0, 2, size=shape, dtype=np.int8) * np.int8(2) - np.int8(1)
        reached += int((signs @ sum_P >= least).sum())
    return (1 + reached) / (1 + _FLIPS)
