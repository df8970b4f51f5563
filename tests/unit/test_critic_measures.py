"""Measures of a critic: each against a loop or another library, ties and constants included."""

import itertools
import math

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from weighted_mtp_core.metrics.critic import CriticMeasures, LengthOnly, ScoredResponses, temporal_differences


def judge(responses):
    """Return scored responses from tuples (problem, reward, value of the prompt, values of the tokens)."""
    return ScoredResponses(
        value_N=np.concatenate([values for *_, values in responses]).astype(np.float64),
        before_D=np.array([before for _, _, before, _ in responses], dtype=np.float64),
        length_D=np.array([len(values) for *_, values in responses]),
        reward_D=np.array([reward for _, reward, _, _ in responses], dtype=np.float64),
        problem_D=np.array([problem for problem, *_ in responses]),
    )


LEVELS = st.integers(0, 8).map(lambda level: level / 8)  # few, so that there are ties
RESPONSES = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([0.0, 1.0]),
        LEVELS,
        st.lists(LEVELS, min_size=1, max_size=6),
    ),
    min_size=2,
    max_size=12,
).filter(lambda responses: len({reward for _, reward, _, _ in responses}) == 2)


def finals(responses):
    return np.array([values[-1] for *_, values in responses])


def rewards(responses):
    return np.array([reward for _, reward, _, _ in responses])


@settings(max_examples=50)
@given(RESPONSES)
def test_auc_brier_and_cross_entropy_are_those_of_scikit_learn(responses):
    found = CriticMeasures.of(judge(responses))

    assert found.auc == pytest.approx(roc_auc_score(rewards(responses), finals(responses)))
    assert found.brier == pytest.approx(brier_score_loss(rewards(responses), finals(responses)))
    assert found.bce == pytest.approx(log_loss(rewards(responses), finals(responses).clip(1e-6, 1 - 1e-6)))


@given(RESPONSES)
def test_auc_before_the_end_uses_the_value_after_a_share_of_the_tokens(responses):
    def after(share):
        return [values[math.ceil(share * len(values)) - 1] for *_, values in responses]

    found = CriticMeasures.of(judge(responses))

    assert found.auc_half == pytest.approx(roc_auc_score(rewards(responses), after(0.5)))
    assert found.auc_quarter == pytest.approx(roc_auc_score(rewards(responses), after(0.25)))


@given(RESPONSES, st.integers(0, 2**16))
def test_falls_at_slips_are_those_of_a_loop_over_responses(responses, seed):
    generator = np.random.default_rng(seed)
    slips = [generator.random(len(values)) < 0.3 for *_, values in responses]
    expected, chance = [], []
    for (_, reward, before, values), slip in zip(responses, slips, strict=True):
        changes = np.diff([before, *values])
        if slip.any() and reward < 0.5:
            expected.append(slip[changes == changes.min()].mean())
            chance.append(slip.mean())

    judged = attrs.evolve(judge(responses), slip_N=np.concatenate(slips))

    assert CriticMeasures.of(judged).falls_at_slip == (pytest.approx(np.mean(expected)) if expected else None)
    constant = CriticMeasures.of(judged.by_constant()).falls_at_slip
    assert constant == (pytest.approx(np.mean(chance)) if chance else None)


def test_without_known_slips_nothing_is_said_about_them():
    found = CriticMeasures.of(judge([(0, 1.0, 0.5, [0.5]), (0, 0.0, 0.5, [0.5])]))

    assert "critic_falls_at_slip" not in found.metrics("critic_")


@given(RESPONSES)
def test_values_above_1_count_as_1_but_keep_their_order(responses):
    """A critic that knows values up to a factor gives such values."""
    large = [
        (problem, reward, 4 * before, [4 * v for v in values])
        for problem, reward, before, values in responses
    ]
    cut = [
        (problem, reward, min(before, 1), [min(v, 1) for v in values])
        for problem, reward, before, values in large
    ]

    found, of_cut = CriticMeasures.of(judge(large)), CriticMeasures.of(judge(cut))

    of_order = CriticMeasures.of(judge(responses))
    ordered = ("auc", "auc_half", "auc_quarter", "pairwise_accuracy")
    for name, value in attrs.asdict(found).items():
        assert value == pytest.approx(getattr(of_order if name in ordered else of_cut, name)), name


@given(RESPONSES)
def test_pairwise_accuracy_is_that_of_a_loop_over_pairs_within_problems(responses):
    scores = []
    for (problem, reward, _, values), (other, rival, _, others) in itertools.permutations(responses, 2):
        if problem == other and reward > rival:
            scores.append((values[-1] > others[-1]) + 0.5 * (values[-1] == others[-1]))

    found = CriticMeasures.of(judge(responses)).pairwise_accuracy

    assert found == (pytest.approx(sum(scores) / len(scores)) if scores else None)


def test_calibration_error_is_that_of_scikit_learns_bins():
    generator = np.random.default_rng(0)
    values = generator.random(500)
    right = (generator.random(500) < values**2).astype(float)
    counts = np.histogram(values, bins=15, range=(0, 1))[0]
    rate, mean = calibration_curve(right, values, n_bins=15)

    found = CriticMeasures.of(
        judge([(0, reward, 0.5, [value]) for value, reward in zip(values, right, strict=True)])
    )

    assert found.ece == pytest.approx((counts * np.abs(rate - mean)).sum() / 500)
    assert found.ece > 0.1


@given(RESPONSES)
def test_td_errors_and_their_spikiness_are_those_of_a_loop_over_tokens(responses):
    expected, spikes = [], []
    for _, reward, before, values in responses:
        after = [*values[:-1], reward]
        errors = [now - then for now, then in zip(after, [before, *values[:-1]], strict=True)]
        sizes = [abs(error) for error in errors]
        spikes.append(max(sizes) / (sum(sizes) / len(sizes)) if any(sizes) else 1.0)
        expected += errors

    judged = judge(responses)

    assert temporal_differences(judged).tolist() == pytest.approx(expected)
    assert CriticMeasures.of(judged).td_spikiness == pytest.approx(sum(spikes) / len(spikes))


def spearman(x, y):
    alike = len(set(x)) == 1 or len(set(y)) == 1
    return 0.0 if alike else spearmanr(x, y).statistic


@settings(max_examples=30)
@given(RESPONSES)
def test_rank_correlations_are_those_of_scipy(responses):
    lengths = [len(values) for *_, values in responses]
    by_position = [spearman(values, range(len(values))) for *_, values in responses]

    found = CriticMeasures.of(judge(responses))

    assert found.position_correlation == pytest.approx(sum(by_position) / len(by_position))
    assert found.length_correlation == pytest.approx(spearman(finals(responses), lengths))


def test_the_constant_is_the_mean_reward_everywhere_and_tells_nothing():
    judged = judge([(0, 1.0, 0.1, [0.2, 0.9]), (0, 0.0, 0.1, [0.3] * 4), (1, 0.0, 0.1, [0.1])])
    found = CriticMeasures.of(judged.by_constant())

    assert (found.auc, found.pairwise_accuracy, found.margin) == (0.5, 0.5, 0.0)
    assert found.ece == pytest.approx(0.0)
    assert found.brier == pytest.approx(2 / 9)
    assert (found.position_correlation, found.length_correlation) == (0.0, 0.0)
    assert found.td_spikiness == pytest.approx((2 + 4 + 1) / 3)  # all surprise comes with the last token


def test_length_alone_is_a_logistic_regression_on_the_number_of_tokens():
    generator = np.random.default_rng(1)
    length = generator.integers(1, 50, size=400)
    right = (generator.random(400) < 1 / (1 + np.exp(0.1 * (length - 20)))).astype(float)
    free = LogisticRegression(C=np.inf, max_iter=1000).fit(length[:, None], right)

    rule = LengthOnly.fit(length, right)

    expected = free.predict_proba(np.arange(1, 50)[:, None])[:, 1]
    np.testing.assert_allclose(rule.values(np.arange(1, 50)), expected, atol=0.01)


@pytest.mark.parametrize(
    ("length", "right", "expected"),
    [
        ([3, 3, 3, 3], [1.0, 0.0, 0.0, 0.0], 1.5 / 5),
        ([1, 2, 3, 4], [1.0, 1.0, 1.0, 1.0], 4.5 / 5),
    ],
    ids=["equal lengths", "all right"],
)
def test_lengths_that_say_nothing_give_the_rate(length, right, expected):
    rule = LengthOnly.fit(np.array(length), np.array(right))

    assert rule.slope == 0.0
    assert rule.values(np.array([1, 1000])).tolist() == pytest.approx([expected, expected])


def test_the_value_of_length_alone_counts_the_tokens_so_far():
    rule = LengthOnly(slope=1.0, intercept=0.0)
    judged = judge([(0, 1.0, 0.5, [0.5, 0.5]), (0, 0.0, 0.5, [0.5])]).by_length(rule)

    assert judged.before_D.tolist() == [0.5, 0.5]
    assert judged.value_N.tolist() == pytest.approx([1 / (1 + math.exp(-n)) for n in (1, 2, 1)])


def test_ties_are_no_advantage_of_length_alone():
    judged = judge([(0, 1.0, 0.5, [0.5] * 3), (0, 0.0, 0.5, [0.9] * 3)])

    assert CriticMeasures.of(judged.by_length(LengthOnly(slope=2.0, intercept=0.0))).pairwise_accuracy == 0.5
