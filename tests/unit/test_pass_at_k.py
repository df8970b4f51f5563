"""pass@k is the share of all k-subsets of the samples that contain a passed sample."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.metrics.pass_at_k import pass_at_k


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(10, 3, 1, 0.3), (10, 3, 5, 0.916667), (200, 13, 10, 0.497551), (5, 0, 3, 0.0), (5, 5, 1, 1.0)],
)
def test_known_answers(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-6)


@given(st.data())
def test_it_is_the_share_of_subsets_with_a_passed_sample(data):
    passed = data.draw(st.lists(st.booleans(), min_size=1, max_size=9))
    k = data.draw(st.integers(1, len(passed)))
    subsets = [any(subset) for subset in combinations(passed, k)]

    assert pass_at_k(len(passed), sum(passed), k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_k_above_n_is_refused(n, c, k):
    with pytest.raises(ValueError, match="is not defined"):
        pass_at_k(n, c, k)
