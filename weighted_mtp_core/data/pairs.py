"""Makes pairs of a correct and an incorrect response to the same problem, by default balanced by length.

The pairs depend only on the data and the recipe, so every process gets the same pairs in the same order.

Shape letters: D documents, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weighted_mtp_core.api import is_correct
from weighted_mtp_core.api.datasets import DIFFICULTIES, difficulty_bin
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.recipe.schema import PairsTable

Rows = NDArray[np.int64]
Pair = tuple[int, int]


def make_pairs(token_set: TokenSet, table: PairsTable) -> Rows:
    """Return unique pairs (correct, incorrect) of document numbers, int64 `[P, 2]`.

    The responses of a pair answer the same problem and come from the same length bin, so their lengths differ
    by less than the factor `length_ratio`. If a bin has correct and incorrect responses to a problem, each of
    these responses gets a partner; responses of the rarer label are used several times, in turn. Then pairs
    are dropped to satisfy `max_pairs_per_problem` and `difficulty_weights`, and until the correct response is
    longer in as many pairs as it is shorter. With `length_ratio = 1`, the two lengths of a pair are equal;
    with `length_ratio = 0`, lengths are ignored.

    Args:
        token_set: Responses with rewards.
        table: The recipe's `[critic.pairs]`.

    Raises:
        WmtpError: No pair is left, for example because no problem has a correct and an incorrect response of
            similar length.
    """
    correct_D = is_correct(token_set.reward_D)
    length_D = token_set.response_D
    bin_D = length_bins(length_D, ratio=table.length_ratio)
    order_D = np.argsort(token_set.problem_D, kind="stable")
    problems = np.split(order_D, np.flatnonzero(np.diff(token_set.problem_D[order_D])) + 1)
    problems.sort(key=lambda members: int(members[0]))  # by first document, whatever the problem numbers
    found: list[list[Pair]] = [[] for _ in DIFFICULTIES]
    for members in problems:
        chosen = list(_of_problem(members, correct_D, bin_D))
        most = table.max_pairs_per_problem or len(chosen)
        found[difficulty_bin(float(correct_D[members].mean()))] += _evenly(chosen, min(most, len(chosen)))
    weights = table.difficulty_weights or (1.0,) * len(DIFFICULTIES)
    kept = [
        pair
        for pairs, weight in zip(found, weights, strict=True)
        for pair in _evenly(pairs, math.floor(weight / max(weights) * len(pairs) + 0.5))
    ]
    if table.length_ratio:
        kept = _balanced(kept, length_D)
    if not kept:
        raise WmtpError(
            "no problem has both a correct and an incorrect response"
            + (" of similar length" if table.length_ratio else "")
            + ", so there are no pairs to learn from",
            hint="choose data with several labelled responses a problem, a larger "
            "`critic.pairs.length_ratio`, or a pointwise critic objective",
        )
    return np.asarray(kept, dtype=np.int64)


def length_bins(length_D: NDArray[np.integer[Any]], *, ratio: float) -> Rows:
    """Return the number of each length's bin; the bounds of the bins grow by the factor `ratio`.

    With `ratio` 1, each length has a bin of its own. With `ratio` 0, there is one bin for all lengths.
    """
    if ratio == 0:
        return np.zeros(len(length_D), dtype=np.int64)
    if ratio == 1:
        return length_D.astype(np.int64)
    bin_D: Rows = np.floor(np.log(np.maximum(length_D, 1)) / math.log(ratio)).astype(np.int64)
    return bin_D


def _of_problem(members: Rows, correct_D: NDArray[np.bool_], bin_D: Rows) -> Iterator[Pair]:
    """Yield the pairs of one problem, one length bin after the other."""
    for number in np.unique(bin_D[members]):
        inside = members[bin_D[members] == number]
        right, wrong = inside[correct_D[inside]], inside[~correct_D[inside]]
        if len(right) and len(wrong):
            for i in range(max(len(right), len(wrong))):
                yield int(right[i % len(right)]), int(wrong[i % len(wrong)])


def _evenly(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """Return `count` pairs, evenly spread over the sequence."""
    return [pairs[i * len(pairs) // count] for i in range(count)]


def _balanced(pairs: Sequence[Pair], length_D: NDArray[np.integer[Any]]) -> list[Pair]:
    """Drop pairs until the correct response is longer in as many pairs as it is shorter."""
    ways: dict[int, list[Pair]] = {-1: [], 0: [], 1: []}
    for right, wrong in pairs:
        ways[int(np.sign(length_D[right] - length_D[wrong]))].append((right, wrong))
    count = min(len(ways[-1]), len(ways[1]))
    return sorted([*_evenly(ways[-1], count), *ways[0], *_evenly(ways[1], count)])
