"""Pairs for a critic: unique, of one problem, of one length bin, distributed as in the recipe."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from weighted_mtp_core.api.datasets import difficulty_bin
from weighted_mtp_core.data.pairs import length_bins, make_pairs
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.recipe.schema import PairsTable

ANY_LENGTH = PairsTable(length_ratio=0)


def token_set(responses):
    """Return documents from tuples (problem, is correct, number of tokens after a prompt of two tokens)."""
    lengths = [2 + length for _, _, length in responses]
    return TokenSet(
        ids_N=np.zeros(sum(lengths), dtype=np.int64),
        start_D1=np.concatenate([[0], np.cumsum(lengths)]),
        prompt_D=np.full(len(lengths), 2, dtype=np.int64),
        reward_D=np.asarray([float(right) for _, right, _ in responses], dtype=np.float32),
        problem_D=np.asarray([problem for problem, _, _ in responses], dtype=np.int64),
        example_ids=tuple(str(i) for i in range(len(lengths))),
    )


responses = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(1, 40)), min_size=2, max_size=60)
ratios = st.sampled_from([0, 1, 1.1, 1.25, 2.0])


def pairs_of(drawn, table):
    try:
        return [tuple(pair) for pair in make_pairs(token_set(drawn), table).tolist()]
    except WmtpError:
        return []


@given(drawn=responses, ratio=ratios)
def test_a_pair_is_correct_and_incorrect_of_one_problem_and_one_length_bin(drawn, ratio):
    found = pairs_of(drawn, PairsTable(length_ratio=ratio))

    assert len(set(found)) == len(found)
    for right, wrong in found:
        (problem, is_right, length), (other, is_other_right, other_length) = drawn[right], drawn[wrong]
        assert (problem, is_right, is_other_right) == (other, True, False)
        if ratio:
            assert max(length, other_length) / min(length, other_length) <= ratio


@given(drawn=responses, ratio=st.sampled_from([0, 1]))
def test_every_response_that_has_a_partner_is_in_a_pair(drawn, ratio):
    """The expected responses come from a loop over all pairs of responses."""
    bins = length_bins(np.asarray([length for _, _, length in drawn]), ratio=ratio)
    partnered = {
        i
        for i, (problem, right, _) in enumerate(drawn)
        for j, (other, other_right, _) in enumerate(drawn)
        if problem == other and right != other_right and bins[i] == bins[j]
    }

    assert {i for pair in pairs_of(drawn, PairsTable(length_ratio=ratio)) for i in pair} == partnered


@given(drawn=responses, most=st.integers(1, 5))
def test_a_problem_has_no_more_pairs_than_the_limit(drawn, most):
    everything = pairs_of(drawn, ANY_LENGTH)
    found = pairs_of(drawn, PairsTable(length_ratio=0, max_pairs_per_problem=most))
    counts = Counter(drawn[right][0] for right, _ in everything)

    assert set(found) <= set(everything)
    assert Counter(drawn[right][0] for right, _ in found) == {p: min(n, most) for p, n in counts.items()}


@given(drawn=responses, weights=st.tuples(*[st.floats(0, 3)] * 5).filter(lambda w: max(w) > 0.01))
def test_a_difficulty_bin_keeps_its_share_of_pairs(drawn, weights):
    rewards = defaultdict(list)
    for problem, right, _ in drawn:
        rewards[problem].append(right)

    def by_bin(found):
        return Counter(difficulty_bin(np.mean(rewards[drawn[right][0]])) for right, _ in found)

    everything = by_bin(pairs_of(drawn, ANY_LENGTH))
    found = pairs_of(drawn, PairsTable(length_ratio=0, difficulty_weights=weights))
    kept = by_bin(found)

    assert len(set(found)) == len(found)
    for number, count in everything.items():
        assert kept[number] == pytest.approx(count * weights[number] / max(weights), abs=0.5001)


@given(drawn=responses, ratio=st.sampled_from([1, 1.25, 2.0]))
def test_the_correct_one_is_the_longer_as_often_as_the_shorter(drawn, ratio):
    lengths = [(drawn[r][2], drawn[w][2]) for r, w in pairs_of(drawn, PairsTable(length_ratio=ratio))]

    assert sum(right > wrong for right, wrong in lengths) == sum(right < wrong for right, wrong in lengths)


def test_many_pairs_remain_after_balancing_lengths():
    generator = np.random.default_rng(0)
    drawn = [
        (problem, right, int(generator.integers(20, 60 if right else 120)))
        for problem in range(200)
        for right in (True, False)
        for _ in range(8)
    ]
    everything = [(drawn[r][2], drawn[w][2]) for r, w in pairs_of(drawn, ANY_LENGTH)]

    assert np.mean([right < wrong for right, wrong in everything]) > 0.75
    assert len(pairs_of(drawn, PairsTable())) > 0.4 * len(everything)


@example(
    drawn=[
        *((0, right, length) for right, length in [(False, 29), (False, 31), (True, 1), (True, 30)]),
        *((1, right, length) for right, length in [(False, 1), (False, 24), (True, 1), (True, 23)]),
    ]
)
@given(drawn=responses)
def test_pairs_do_not_depend_on_names_of_problems(drawn):
    renamed = [(97 - 13 * problem, right, length) for problem, right, length in drawn]

    assert set(pairs_of(drawn, PairsTable())) == set(pairs_of(renamed, PairsTable()))


@pytest.mark.parametrize(("share", "number"), [(0, 0), (0.19, 0), (0.2, 1), (0.5, 2), (0.99, 4), (1, 4)])
def test_difficulty_is_the_fifth_of_the_correct_share(share, number):
    assert difficulty_bin(share) == number


def test_bounds_of_length_bins_grow_by_the_ratio():
    bins = length_bins(np.arange(1, 1000), ratio=1.25)

    assert (np.diff(bins) >= 0).all()
    for length, number in enumerate(bins.tolist(), start=1):
        assert number == math.floor(math.log(length) / math.log(1.25))


def test_no_pair_is_an_error_with_a_hint():
    with pytest.raises(WmtpError, match="no problem has both a correct and an incorrect response, so"):
        make_pairs(token_set([(0, True, 4), (1, False, 4)]), ANY_LENGTH)
    with pytest.raises(WmtpError, match="incorrect response of similar length") as caught:
        make_pairs(token_set([(0, True, 4), (0, False, 40)]), PairsTable())
    assert "`critic.pairs.length_ratio`" in caught.value.hint


@pytest.mark.parametrize("weights", [(1.0,), (0.0,) * 5, (1, 1, 1, 1, -1), (math.inf,) * 5])
def test_meaningless_weights_are_refused(weights):
    with pytest.raises(ValueError, match="must be 5 numbers"):
        PairsTable(difficulty_weights=weights)


@pytest.mark.parametrize("ratio", [0.5, -1.0, math.inf, math.nan])
def test_a_ratio_below_one_is_refused(ratio):
    with pytest.raises(ValueError, match="must be 0 or at least 1"):
        PairsTable(length_ratio=ratio)
