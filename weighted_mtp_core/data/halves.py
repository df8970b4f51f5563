"""Halve the critic's validation split: one half chooses a checkpoint, the other half judges the critic.

If the same responses choose the best of several checkpoints and then judge the chosen checkpoint, the result
tends to be too high. So the test whether a critic is better than a constant uses responses that were not used
to choose its checkpoint.

Shape letters: D documents, P problems.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from weighted_mtp_core.api import is_correct
from weighted_mtp_core.data.tokens import TokenSet

Half = Literal["choosing", "judging"]
HALVES: tuple[Half, Half] = ("choosing", "judging")

_SEED = 0  # fixed, so that a critic from another run is not judged on the responses that chose its checkpoint


def documents_of(half: Half, token_set: TokenSet) -> NDArray[np.int64]:
    """Return the numbers of the documents in one half of a split, ascending, int64.

    All responses to one problem are in the same half. Problems are assigned to the two halves alternately, in
    a random order that depends only on the data: first the problems with both correct and incorrect
    responses, then the problems with only incorrect responses, then the problems with only correct responses.
    """
    _, problem_D = np.unique(token_set.problem_D, return_inverse=True)
    correct_D = is_correct(np.asarray(token_set.reward_D))
    has_correct_P = np.bincount(problem_D, correct_D) > 0
    has_incorrect_P = np.bincount(problem_D, ~correct_D) > 0
    kind_P = np.where(has_correct_P & has_incorrect_P, 0, np.where(has_incorrect_P, 1, 2))
    order = np.random.default_rng(_SEED).permutation(len(kind_P))
    order = order[np.argsort(kind_P[order], kind="stable")]
    judges_P = np.zeros(len(kind_P), dtype=np.bool_)
    judges_P[order[1::2]] = True
    documents: NDArray[np.int64] = np.flatnonzero(judges_P[problem_D] == (half == "judging"))
    return documents
