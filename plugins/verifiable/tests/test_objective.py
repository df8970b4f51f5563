"""The value head's three losses, worked out by hand."""

import math

import pytest
import torch
from attrs import evolve
from weighted_mtp_core.api import Batch

from weighted_mtp_verifiable._objective import (
    bradley_terry,
    final_accuracy,
    lambda_return,
    monte_carlo,
    outcome,
    trained_prefixes,
)


def batch(response, reward, *, document=None):
    response_BT = torch.tensor(response, dtype=torch.bool)
    document_BT = torch.zeros_like(response_BT, dtype=torch.long)
    if document is not None:
        document_BT = torch.tensor(document)
    return Batch(
        ids_BT=torch.zeros_like(document_BT),
        document_BT=document_BT,
        response_BT=response_BT,
        reward_BT=torch.tensor(reward, dtype=torch.float32) * response_BT,
        group_BT=torch.zeros_like(document_BT),
    )


def logit(probability):
    return math.log(probability / (1 - probability))


# Row 0: one prompt token, then a correct response of three tokens. Row 1: two prompt tokens, then a wrong
# response of two tokens.
TWO = batch([[0, 1, 1, 1], [0, 0, 1, 1]], [[1.0] * 4, [0.0] * 4])
VALUES = [[0.2, 0.5, 0.4, 0.9], [0.7, 0.3, 0.6, 0.1]]
LOGIT_BT = torch.tensor([[logit(value) for value in row] for row in VALUES])


def test_values_are_trained_on_response_tokens_and_the_last_prompt_token():
    assert trained_prefixes(TWO).tolist() == [[True, True, True, True], [False, True, True, True]]


def test_a_response_at_the_start_of_a_document_has_no_token_before():
    packed = batch([[0, 1, 1, 1]], [[1.0] * 4], document=[[0, 0, 1, 1]])

    assert trained_prefixes(packed).tolist() == [[True, True, True, True]]
    assert trained_prefixes(batch([[0, 0, 1]], [[1.0] * 3], document=[[0, 0, 1]])).tolist() == [
        [False, False, True]
    ]


def test_the_outcome_is_on_every_token_of_the_document():
    packed = batch([[0, 1, 0, 1, 0]], [[1.0, 1.0, 0.0, 0.25, 0.0]], document=[[0, 0, 1, 1, -1]])

    assert outcome(packed).tolist() == [[1.0, 1.0, 0.25, 0.25, 0.0]]


def test_monte_carlo_by_hand():
    loss = monte_carlo(LOGIT_BT, TWO, lam=0.5)

    right = [-math.log(value) for value in (0.2, 0.5, 0.4, 0.9)]
    wrong = [-math.log(1 - value) for value in (0.3, 0.6, 0.1)]
    assert float(loss) == pytest.approx((sum(right) / 4 + sum(wrong) / 3) / 2)


def test_lambda_return_by_hand():
    loss = lambda_return(LOGIT_BT, TWO, lam=0.5)

    # The return of a prefix mixes the next value with the next return: G_t = .5 * V_{t+1} + .5 * G_{t+1}.
    # The return of the whole response is R, and so is the return of the prefix one token before the end.
    right = {3: 1.0, 2: 1.0, 1: 0.5 * 0.4 + 0.5 * 1.0, 0: 0.5 * 0.5 + 0.5 * 0.7}
    wrong = {3: 0.0, 2: 0.0, 1: 0.5 * 0.6 + 0.5 * 0.0}
    first = [_cross_entropy(VALUES[0][t], target) for t, target in right.items()]
    second = [_cross_entropy(VALUES[1][t], target) for t, target in wrong.items()]
    assert float(loss) == pytest.approx((sum(first) / 4 + sum(second) / 3) / 2)


def _cross_entropy(value, target):
    return -(target * math.log(value) + (1 - target) * math.log(1 - value))


def test_with_lambda_one_the_lambda_return_is_the_reward():
    torch.testing.assert_close(lambda_return(LOGIT_BT, TWO, lam=1.0), monte_carlo(LOGIT_BT, TWO, lam=1.0))


def test_targets_of_the_lambda_return_carry_no_gradient():
    logit_BT = LOGIT_BT.clone().requires_grad_()
    lambda_return(logit_BT, TWO, lam=0.0).backward()

    # d/dlogit of a cross-entropy is V - target; with lam 0 the target of token 1 is V_2 = .4.
    assert float(logit_BT.grad[0, 1]) == pytest.approx((0.5 - 0.4) / 4 / 2)


def test_bradley_terry_by_hand():
    score_BT = torch.tensor([[5.0, 1.0, 9.0], [5.0, 7.0, 0.0]])
    pair = batch([[0, 1, 0], [0, 1, 1]], [[1.0] * 3, [0.0] * 3])

    # Only the score of the last response token counts: 1 against 0.
    assert float(bradley_terry(score_BT, pair, lam=0.5)) == pytest.approx(0.313262, abs=1e-6)


def test_bradley_terry_depends_on_differences_only():
    pair = batch([[0, 1], [0, 1]], [[1.0] * 2, [0.0] * 2])
    score_BT = torch.tensor([[0.0, 0.3], [0.0, -0.4]])

    torch.testing.assert_close(
        bradley_terry(score_BT + 5, pair, lam=0.5), bradley_terry(score_BT, pair, lam=0.5)
    )


def test_final_accuracy_by_hand():
    # The correct response ends at .9 and the wrong one at .1. With absolute log-odds, both end at .9.
    assert float(final_accuracy(LOGIT_BT, TWO)) == 1.0
    assert float(final_accuracy(LOGIT_BT.abs(), TWO)) == 0.5


@pytest.mark.parametrize("objective", [monte_carlo, lambda_return, bradley_terry])
def test_without_responses_loss_and_gradient_are_zero(objective):
    nothing = batch([[0, 0], [0, 0]], [[0.0] * 2, [0.0] * 2])
    logit_BT = torch.zeros(2, 2, requires_grad=True)
    loss = objective(logit_BT, nothing, lam=0.5)
    loss.backward()

    assert float(loss.detach()) == 0.0
    assert not logit_BT.grad.any()


@pytest.mark.parametrize("objective", [monte_carlo, lambda_return, bradley_terry])
def test_parts_of_a_batch_add_up_by_their_share_of_the_rows(objective):
    four = batch(
        [[0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0]], [[1.0] * 4, [0.0] * 4, [1.0] * 4, [0.0] * 4]
    )
    logit_BT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    parts = [
        evolve(
            four,
            **{
                name: getattr(four, name)[rows]
                for name in ("ids_BT", "document_BT", "response_BT", "reward_BT", "group_BT")
            },
        )
        for rows in (slice(2), slice(2, 4))
    ]

    halves = objective(logit_BT[:2], parts[0], lam=0.5) + objective(logit_BT[2:], parts[1], lam=0.5)

    torch.testing.assert_close(halves / 2, objective(logit_BT, four, lam=0.5))
