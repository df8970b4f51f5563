"""TD errors and advantages: numbers worked out by hand, identities, and equality with a loop over tokens."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weighted_mtp_verifiable._advantage import advantages, td_errors
from weighted_mtp_verifiable._reductions import discounted_sums, document_sums, remaining_response_tokens

# V before each of four actions is .2, .5, .4, .9 and R = 1: one prompt token, then the response.
VALUE_BT = torch.tensor([[0.2, 0.5, 0.4, 0.9, 0.7]], dtype=torch.float64)
REWARD_BT = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
RESPONSE_BT = torch.tensor([[False, True, True, True, True]])
DOCUMENT_BT = torch.zeros(1, 5, dtype=torch.long)


def estimate(value_BT, reward_BT, document_BT, response_BT, *, gamma=1.0, lam=1.0):
    delta_BT = td_errors(value_BT, reward_BT, document_BT=document_BT, response_BT=response_BT, gamma=gamma)
    return advantages(delta_BT, document_BT=document_BT, gamma=gamma, lam=lam)


def loop(value_BT, reward_BT, document_BT, response_BT, *, gamma, lam):
    """Return the advantages by their definition, token by token, in Python floats."""
    advantage_BT = torch.zeros_like(value_BT)
    for b in range(len(value_BT)):
        for document in set(document_BT[b].tolist()) - {-1}:
            positions = [t for t, d in enumerate(document_BT[b].tolist()) if d == document]
            answered = [t for t in positions if response_BT[b, t]]
            running = 0.0
            for t in reversed([t for t in positions if answered and t <= answered[-1]]):
                before = float(value_BT[b, t - 1]) if t > positions[0] else 0.0
                after = 0.0 if t == answered[-1] else float(value_BT[b, t])
                earned = float(reward_BT[b, t]) if t == answered[-1] else 0.0
                running = earned + gamma * after - before + gamma * lam * running
                advantage_BT[b, t] = running
    return advantage_BT


@st.composite
def batches(draw):
    """Draw rows of packed documents of random lengths, with padding; values and rewards are float64."""
    rows = draw(
        st.lists(
            st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=3),
            min_size=1,
            max_size=3,
        )
    )
    width = max(sum(prompt + response for prompt, response in row) for row in rows) + draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    value_BT = torch.rand(len(rows), width, generator=generator, dtype=torch.float64)
    reward_BT = torch.zeros(len(rows), width, dtype=torch.float64)
    document_BT = torch.full((len(rows), width), -1)
    response_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        start = 0
        for number, (prompt, response) in enumerate(row):
            end = start + prompt + response
            document_BT[b, start:end] = number
            response_BT[b, start + prompt : end] = True
            reward_BT[b, start + prompt : end] = draw(st.floats(0, 1))
            start = end
    return value_BT, reward_BT, document_BT, response_BT


def test_td_errors_by_hand():
    delta_BT = td_errors(VALUE_BT, REWARD_BT, document_BT=DOCUMENT_BT, response_BT=RESPONSE_BT, gamma=1.0)

    # .5 - .2, .4 - .5, .9 - .4, 1 - .9; the value after the last token (.7) is not used.
    torch.testing.assert_close(delta_BT[0, 1:], torch.tensor([0.3, -0.1, 0.5, 0.1], dtype=torch.float64))


def test_td_errors_with_a_discount_by_hand():
    delta_BT = td_errors(VALUE_BT, REWARD_BT, document_BT=DOCUMENT_BT, response_BT=RESPONSE_BT, gamma=0.5)

    # .25 - .2, .2 - .5, .45 - .4, 1 - .9: the reward comes with the last token, undiscounted.
    torch.testing.assert_close(delta_BT[0, 1:], torch.tensor([0.05, -0.3, 0.05, 0.1], dtype=torch.float64))


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (0.0, [0.3, -0.1, 0.5, 0.1]),
        (0.5, [0.3875, 0.175, 0.55, 0.1]),
        (0.95, [0.7419875, 0.46525, 0.595, 0.1]),
        (1.0, [0.8, 0.5, 0.6, 0.1]),
    ],
)
def test_advantages_by_hand(lam, expected):
    advantage_BT = estimate(VALUE_BT, REWARD_BT, DOCUMENT_BT, RESPONSE_BT, lam=lam)

    torch.testing.assert_close(advantage_BT[0, 1:], torch.tensor(expected, dtype=torch.float64))


@settings(deadline=None)
@given(batches(), st.floats(0.5, 1), st.floats(0, 1))
def test_advantages_equal_a_loop_over_tokens(batch, gamma, lam):
    actual_BT = estimate(*batch, gamma=gamma, lam=lam)

    torch.testing.assert_close(actual_BT, loop(*batch, gamma=gamma, lam=lam), rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(batches())
def test_without_discount_advantages_telescope_to_reward_minus_value(batch):
    value_BT, reward_BT, document_BT, response_BT = batch
    advantage_BT = estimate(*batch)
    before_BT = torch.roll(value_BT, 1, dims=1)
    starts_BT = torch.ones_like(response_BT)
    starts_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    before_BT[starts_BT] = 0.0  # nothing comes before a document

    torch.testing.assert_close(
        advantage_BT[response_BT], (reward_BT - before_BT)[response_BT], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("lam", [0.5, 0.95, 1.0])
def test_the_reward_moves_the_advantage_of_every_response_token(lam):
    wrong_BT = estimate(VALUE_BT, torch.zeros_like(REWARD_BT), DOCUMENT_BT, RESPONSE_BT, lam=lam)
    right_BT = estimate(VALUE_BT, REWARD_BT, DOCUMENT_BT, RESPONSE_BT, lam=lam)

    # R enters at the last of four tokens, so the advantage of the first token contains lam^3 R.
    torch.testing.assert_close(
        (right_BT - wrong_BT)[0, 1:], torch.tensor([lam**3, lam**2, lam, 1.0], dtype=torch.float64)
    )


def test_advantages_are_continuous_as_lambda_goes_to_one():
    nearly_BT = estimate(VALUE_BT, REWARD_BT, DOCUMENT_BT, RESPONSE_BT, lam=1 - 1e-9)

    torch.testing.assert_close(
        nearly_BT, estimate(VALUE_BT, REWARD_BT, DOCUMENT_BT, RESPONSE_BT), rtol=0, atol=1e-8
    )


def test_values_of_another_document_in_the_row_change_nothing():
    value_BT = torch.cat([VALUE_BT, VALUE_BT], dim=1)
    other_BT = torch.cat([VALUE_BT, 1 - VALUE_BT], dim=1)
    rest = (
        torch.cat([REWARD_BT, REWARD_BT], dim=1),
        torch.cat([DOCUMENT_BT, DOCUMENT_BT + 1], dim=1),
        torch.cat([RESPONSE_BT, RESPONSE_BT], dim=1),
    )

    assert torch.equal(estimate(value_BT, *rest, lam=0.9)[:, :5], estimate(other_BT, *rest, lam=0.9)[:, :5])


def test_a_response_in_two_parts_telescopes_over_the_tokens_between():
    value_BT = torch.tensor([[0.2, 0.5, 0.1, 0.9, 0.7]], dtype=torch.float64)
    response_BT = torch.tensor([[False, True, False, True, True]])
    reward_BT = response_BT.double()

    advantage_BT = estimate(value_BT, reward_BT, DOCUMENT_BT, response_BT)

    # R - V before: 1 - .2, 1 - .1, 1 - .9.
    torch.testing.assert_close(advantage_BT[response_BT], torch.tensor([0.8, 0.9, 0.1], dtype=torch.float64))


def test_discounted_sums_by_hand():
    x_BT = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    document_BT = torch.tensor([[0, 0, 0, 1]])

    sums_BT = discounted_sums(x_BT, document_BT=document_BT, discount=0.5)

    # 1 + 2/2 + 4/4, 2 + 4/2, 4, and 8 in a document of its own.
    assert sums_BT.tolist() == [[3.0, 4.0, 4.0, 8.0]]


@given(batches())
def test_remaining_response_tokens_are_counted_exactly(batch):
    _, _, document_BT, response_BT = batch
    expected_BT = torch.zeros_like(document_BT)
    for b, t in itertools.product(range(document_BT.shape[0]), range(document_BT.shape[1])):
        expected_BT[b, t] = response_BT[b, t:][document_BT[b, t:] == document_BT[b, t]].sum()

    assert torch.equal(remaining_response_tokens(response_BT, document_BT), expected_BT)


@given(batches())
def test_document_sums_equal_a_loop(batch):
    value_BT, _, document_BT, _ = batch
    expected_BT = torch.zeros_like(value_BT)
    for b, t in itertools.product(range(value_BT.shape[0]), range(value_BT.shape[1])):
        expected_BT[b, t] = value_BT[b][document_BT[b] == document_BT[b, t]].sum()

    torch.testing.assert_close(document_sums(value_BT, document_BT), expected_BT)
