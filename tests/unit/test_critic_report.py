"""The critic's report: AUC with an interval from resampled problems, and the constant that it must beat."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weighted_mtp_core.api import WmtpError
from weighted_mtp_core.metrics.critic import LengthOnly, ScoredResponses
from weighted_mtp_core.metrics.critic_report import report_critic


def naive_auc(values, rewards):
    right = [value for value, reward in zip(values, rewards, strict=True) if reward >= 0.5]
    wrong = [value for value, reward in zip(values, rewards, strict=True) if reward < 0.5]
    wins = sum((r > w) + 0.5 * (r == w) for r in right for w in wrong)
    return wins / (len(right) * len(wrong))


def report(values, rewards, problems=None):
    """Return the report on responses of one token each, so that every value is a final value."""
    count = len(values)
    judged = ScoredResponses(
        value_N=np.asarray(values, dtype=np.float64),
        before_D=np.full(count, 0.5),
        length_D=np.ones(count, dtype=np.int64),
        reward_D=np.asarray(rewards, dtype=np.float64),
        problem_D=np.asarray(problems if problems is not None else range(count), dtype=np.int64),
    )
    return report_critic(judged, LengthOnly(slope=0.0, intercept=0.0))


@settings(max_examples=30)  # each draws a thousand resamples
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=40))
def test_auc_is_the_share_of_pairs_in_the_right_order(scored):
    values = [value / 10 for value, _ in scored]
    rewards = [float(reward) for _, reward in scored]
    if len(set(rewards)) == 2:
        assert report(values, rewards).critic.auc == pytest.approx(naive_auc(values, rewards))


def test_a_constant_critic_has_auc_one_half_and_the_constants_loss():
    found = report([0.25] * 100, [1.0] * 25 + [0.0] * 75)

    assert found.critic.auc == 0.5
    assert found.critic.bce == pytest.approx(found.constant.bce)
    assert found.constant.bce == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert not found.informative


def test_a_random_critic_is_not_informative():
    generator = np.random.default_rng(0)
    found = report(generator.random(400), generator.random(400) < 0.5)

    assert found.auc_low < 0.5 < found.auc_high
    assert not found.informative


def test_a_good_critic_is_informative_and_its_margin_positive():
    rewards = np.tile([1.0, 0.0], 100)
    values = 0.5 + 0.3 * (rewards - 0.5) + 0.1 * np.random.default_rng(0).standard_normal(200)
    found = report(values, rewards)

    assert found.informative
    assert found.critic.margin == pytest.approx(0.3, abs=0.05)


def test_the_interval_resamples_problems_so_copies_of_a_response_add_nothing():
    generator = np.random.default_rng(2)
    values, rewards = generator.random(40), (generator.random(40) < 0.5).astype(float)
    once = report(values, rewards, problems=range(40))
    copied = report(np.repeat(values, 25), np.repeat(rewards, 25), problems=np.repeat(np.arange(40), 25))

    assert copied.auc_high - copied.auc_low == pytest.approx(once.auc_high - once.auc_low)


def test_one_kind_of_response_is_an_error():
    with pytest.raises(WmtpError, match="all 3 validation responses are correct"):
        report([0.1, 0.2, 0.3], [1.0, 1.0, 1.0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_an_error(value):
    with pytest.raises(WmtpError, match="the critic gives values that are not finite"):
        report([0.1, value, 0.3], [1.0, 0.0, 1.0])


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=60))
def test_reliability_bins_hold_each_response_once_and_compare_like_with_like(scored):
    values, rewards = [value for value, _ in scored], [float(reward) for _, reward in scored]
    if len(set(rewards)) < 2:
        return
    bins = report(values, rewards).reliability

    assert sum(each.count for each in bins) == len(values)
    assert [each.value for each in bins] == sorted(each.value for each in bins)
    assert sum(each.count * each.value for each in bins) == pytest.approx(sum(values))
    assert sum(each.count * each.reward for each in bins) == pytest.approx(sum(rewards))


def test_a_bins_interval_is_wilsons():
    (found,) = report([0.55] * 10, [1.0] * 8 + [0.0] * 2).reliability

    assert (found.count, found.reward) == (10, 0.8)
    for end in (found.low, found.high):  # 1.96 standard errors from the observed rate
        assert abs(found.reward - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / 10))
    assert found.low < 0.8 < found.high


def test_metrics_stand_beside_those_of_a_constant_and_of_length_alone():
    metrics = report([0.2, 0.9, 0.4], [0.0, 1.0, 0.0]).metrics()

    assert metrics["critic_auc"] == 1.0
    assert metrics["critic_constant_auc"] == metrics["critic_length_only_auc"] == 0.5
    assert metrics["critic_constant_brier"] == pytest.approx(2 / 9)
    assert all(re.fullmatch(r"[a-z_]+", name) for name in metrics)
    assert "critic_pairwise_accuracy" not in metrics  # no problem has both outcomes


def test_its_words_give_the_interval_and_the_rivals():
    found = report([0.2, 0.9] * 10, [0.0, 1.0] * 10)

    assert found.words == (
        "AUC 1.000, 95 % interval [1.000, 1.000], on held-out responses "
        "(a constant has 0.5, length alone 0.500)"
    )


@pytest.mark.parametrize(("problems", "mark"), [(20, ""), (2, "UNINFORMATIVE: ")])
def test_the_summary_marks_a_critic_that_is_not_shown_to_be_better_than_a_constant(problems, mark):
    ((name, text),) = report([0.2, 0.9] * problems, [0.0, 1.0] * problems).summary()

    assert name == "critic"
    assert text.startswith(f"{mark}AUC 1.000 [1.000, 1.000] (length alone: 0.500), loss ")
