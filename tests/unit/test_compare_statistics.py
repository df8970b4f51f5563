"""Means, intervals and p-values of few seeds, against scipy and against their definitions."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from weighted_mtp_core.metrics.statistics import difference, estimate, ratio, sign_flip_p, smallest_p

VALUES = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=7)


@given(VALUES)
def test_the_interval_is_that_of_students_t(values):
    found = estimate(values)

    error = stats.sem(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=error or 1e-300)
    assert (found.mean, found.low, found.high) == pytest.approx(
        (sum(values) / len(values), low, high), abs=1e-6
    )


def test_one_value_has_no_interval():
    found = estimate([0.5])

    assert found.mean == 0.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@given(VALUES)
def test_the_p_value_is_the_share_of_signs_that_go_as_far(values):
    whole = [round(1000 * value) for value in values]  # whole numbers have exact sums
    far = [
        abs(sum(sign * value for sign, value in zip(signs, whole, strict=True))) >= abs(sum(whole))
        for signs in itertools.product((1, -1), repeat=len(whole))
    ]

    assert sign_flip_p(values) == pytest.approx(sum(far) / len(far))


@given(VALUES)
def test_the_p_value_is_that_of_scipys_permutation_test(values):
    found = stats.permutation_test(
        ([round(1000 * value) for value in values],),
        sum,
        permutation_type="samples",
        n_resamples=math.inf,
        axis=0,
        vectorized=False,
    )

    # scipy doubles the smaller tail. For a symmetric distribution, this is the same, but it can exceed 1.
    assert sign_flip_p(values) == pytest.approx(min(1.0, found.pvalue))


@pytest.mark.parametrize(("count", "smallest"), [(1, 1.0), (2, 0.5), (5, 0.0625), (10, 2 / 1024)])
def test_equal_signs_give_the_smallest_p_value_that_there_is(count, smallest):
    assert sign_flip_p([0.1 * (i + 1) for i in range(count)]) == smallest == smallest_p(count)


def test_arms_that_do_the_same_have_p_1():
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_has_neither_mean_nor_p_value(value):
    found = difference([1.0, value, 3.0], [1.0, 2.0, 2.0])

    assert math.isnan(found.estimate.mean)
    assert math.isnan(found.p_value)


def test_a_difference_is_paired():
    found = difference([1.0, 5.0, 9.0], [0.5, 4.5, 8.5])  # far apart between seeds, equal differences

    assert found.estimate.mean == found.estimate.low == found.estimate.high == 0.5
    assert found.p_value == 0.25


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(2, 5)), min_size=3, max_size=8), st.booleans())
def test_the_interval_of_a_ratio_ends_where_a_t_test_begins_to_reject(pairs, negative):
    sign = -1 if negative else 1
    part, whole = [x for x, _ in pairs], [sign * y for _, y in pairs]
    found = ratio(part, whole)

    assert found.mean == pytest.approx(sum(part) / sum(whole))
    if stats.ttest_1samp(whole, 0).pvalue >= 0.05:
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        return
    assert found.low <= found.mean <= found.high
    for end in (found.low, found.high):
        rest = [x - end * y for x, y in zip(part, whole, strict=True)]
        if stats.sem(rest) > 1e-3:
            assert stats.ttest_1samp(rest, 0).pvalue == pytest.approx(0.05, abs=1e-4)


def test_a_ratio_by_hand():
    # Without spread in the differences, the ratio is exact.
    found = ratio([0.2, 0.2, 0.2], [0.5, 0.5, 0.5])

    assert (found.mean, found.low, found.high, found.count) == pytest.approx((0.4, 0.4, 0.4, 3))


@pytest.mark.parametrize(
    ("part", "whole"), [([0.1, math.nan], [1.0, 1.0]), ([0.1, 0.2], [1.0, -1.0]), ([0.1], [0.0])]
)
def test_a_ratio_that_is_not_defined_is_nan(part, whole):
    assert math.isnan(ratio(part, whole).mean)


def test_a_ratio_of_one_pair_has_no_interval():
    found = ratio([0.1], [0.4])

    assert found.mean == pytest.approx(0.25)
    assert math.isnan(found.low)
