"""`verifiable.group_advantage`: one weight per response, compared with loops over responses."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.api import BuildContext, StepView

from weighted_mtp_verifiable import GroupAdvantageOptions, build_group_advantage

PROMPT, PADDING = 2, 3


def build(**options):
    return build_group_advantage(
        GroupAdvantageOptions(**options), BuildContext(seed=0, storage=Path("storage"))
    )


def view(responses, *, packed=False):
    """Lay out responses (length, reward, problem), each after a prompt: one per row, or all in one row."""
    width = PADDING + max(length for length, _, _ in responses) + PROMPT
    if packed:
        width = PADDING + sum(length + PROMPT for length, _, _ in responses)
    shape = (1 if packed else len(responses), width)
    document_BT, group_BT = torch.full(shape, -1), torch.full(shape, -1)
    response_BT, reward_BT = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    first = 0
    for number, (length, reward, problem) in enumerate(responses):
        row, first = (0, first) if packed else (number, 0)
        here, answer = slice(first, first + PROMPT + length), slice(first + PROMPT, first + PROMPT + length)
        document_BT[row, here] = number if packed else 0
        group_BT[row, here] = problem
        response_BT[row, answer] = True
        reward_BT[row, answer] = reward
        first += PROMPT + length
    return StepView(
        ids_BT=torch.zeros(shape, dtype=torch.long),
        document_BT=document_BT,
        response_BT=response_BT,
        target_BTK=torch.zeros(*shape, 2, dtype=torch.bool),
        n_future=2,
        step=0,
        training=True,
        reward_BT=reward_BT,
        group_BT=group_BT,
    )


def each_weight(responses, *, packed=False, **options):
    """Return the one weight of each response that has tokens."""
    seen = view(responses, packed=packed)
    weight_BT = build(**options).weigh(seen).weight
    assert not weight_BT[~seen.response_BT].any()
    found, first = [], 0
    for number, (length, _, _) in enumerate(responses):
        row, start = (0, first) if packed else (number, 0)
        weights = set(weight_BT[row, start + PROMPT : start + PROMPT + length].tolist())
        assert len(weights) == (length > 0)
        found += weights
        first += PROMPT + length
    return found


def naive(responses, *, beta, low, high, positives_only):
    answered = [(reward, problem) for length, reward, problem in responses if length]
    weights = []
    for reward, problem in answered:
        group = [other for other, same in answered if same == problem]
        if len(group) == 1:
            group = [other for other, _ in answered]
        advantage = reward - sum(group) / len(group)
        weight = min(max(math.exp(advantage / beta), low), high)
        weights.append(0.0 if positives_only and reward < 0.5 else weight)
    return weights


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([0, 3, 10**12])),
        min_size=1,
        max_size=7,
    ),
    st.sampled_from([0.2, 1.0]),
    st.booleans(),
    st.booleans(),
)
def test_weights_are_those_of_a_loop_over_responses(responses, beta, positives_only, packed):
    found = each_weight(responses, packed=packed, beta=beta, clip=(0.3, 2.0), positives_only=positives_only)

    expected = naive(responses, beta=beta, low=0.3, high=2.0, positives_only=positives_only)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_long_response_counts_as_much_as_a_short_one():
    right, wrong = each_weight([(40, 1.0, 0), (1, 0.0, 0)])

    assert (right, wrong) == pytest.approx((math.exp(0.5), math.exp(-0.5)))


def test_a_response_alone_with_its_problem_is_compared_with_the_batch():
    weights = each_weight([(2, 1.0, 0), (2, 0.0, 1), (2, 0.0, 2), (2, 0.0, 3)])

    assert weights == pytest.approx([math.exp(0.75)] + [math.exp(-0.25)] * 3)


def test_correct_responses_alone_have_equal_weights():
    assert each_weight([(2, 1.0, 0), (3, 1.0, 0), (4, 1.0, 1)]) == [1.0, 1.0, 1.0]


def test_the_share_of_lone_responses_is_logged():
    metrics = build().weigh(view([(9, 1.0, 0), (2, 0.0, 0), (2, 0.0, 1), (0, 0.0, 2)])).metrics

    assert float(metrics["lone_fraction"]) == pytest.approx(1 / 3)
    assert float(metrics["advantage_abs_mean"]) == pytest.approx((0.5 + 0.5 + 1 / 3) / 3)
