"""Training objectives of the value head: three losses, computed from its log-odds and the rewards.

Shape letters: B batch rows, P pairs of rows, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from weighted_mtp_core.api import Batch, is_correct

from weighted_mtp_verifiable._advantage import advantages, td_errors
from weighted_mtp_verifiable._reductions import (
    discounted_sums,
    masked_mean,
    mean_of_row_means,
    remaining_response_tokens,
)


def monte_carlo(logit_BT: Tensor, batch: Batch, *, lam: float) -> Tensor:
    """Return the mean binary cross-entropy between the values of prefixes and the rewards of their responses.

    The prefixes are those of `trained_prefixes`. This is the loss of the verifiers of Cobbe et al. 2021,
    section 4.2.
    """
    del lam
    return _cross_entropy(logit_BT, outcome(batch), batch)


def lambda_return(logit_BT: Tensor, batch: Batch, *, lam: float) -> Tensor:
    """Return the mean binary cross-entropy between the values of prefixes and their lambda-returns.

    The prefixes are those of `trained_prefixes`. The lambda-return (Sutton and Barto 2018, eq. 12.2) of the
    prefix that ends at token t is `V_t + A_{t+1}`. Here V_t is the critic's value of the prefix, without
    gradient, and A_{t+1} the advantage of the next token. The lambda-return of the whole response is its
    reward.
    """
    value_BT = torch.sigmoid(logit_BT.detach())
    delta_BT = td_errors(
        value_BT,
        batch.reward_BT,
        document_BT=batch.document_BT,
        response_BT=batch.response_BT,
        gamma=1.0,
    )
    advantage_BT = advantages(delta_BT, document_BT=batch.document_BT, gamma=1.0, lam=lam)
    return_BT = (value_BT + F.pad(advantage_BT[:, 1:], (0, 1))).clamp(0.0, 1.0)
    ended_BT = remaining_response_tokens(batch.response_BT, batch.document_BT) <= 1
    return _cross_entropy(logit_BT, return_BT.where(~ended_BT, outcome(batch)), batch)


def bradley_terry(logit_BT: Tensor, batch: Batch, *, lam: float) -> Tensor:
    """Return the mean of `-log sigmoid(s_correct - s_incorrect)` over pairs of responses to one problem.

    Here s_correct and s_incorrect are the log-odds after the last token of the correct response (row 2i) and
    of the incorrect response (row 2i + 1). A pair with a row without response tokens adds 0. This is the loss
    of reward models (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1). The loss only ranks responses to the
    same problem, so the values of different problems have no common scale.
    """
    del lam
    position_T = torch.arange(logit_BT.shape[1], device=logit_BT.device)
    last_B = (batch.response_BT * position_T).argmax(dim=1)
    final_B = logit_BT.gather(1, last_B[:, None]).squeeze(1)
    answered_P = batch.response_BT.any(dim=1).view(-1, 2).all(dim=1)
    correct_P, incorrect_P = final_B.view(-1, 2).unbind(dim=1)
    return F.softplus(incorrect_P - correct_P).where(answered_P, 0.0).mean()


def outcome(batch: Batch) -> Tensor:
    """Return for each token of a prompt or response the reward of the response; 0 after the response."""
    rewards_BT = batch.reward_BT.where(batch.response_BT, 0.0)
    total_BT = discounted_sums(rewards_BT, document_BT=batch.document_BT, discount=1.0)
    return total_BT / remaining_response_tokens(batch.response_BT, batch.document_BT).clamp(min=1)


def trained_prefixes(batch: Batch) -> Tensor:
    """Return the mask of tokens whose values are trained: response tokens and tokens directly before one."""
    document_BT, response_BT = batch.document_BT, batch.response_BT
    before_BT = torch.zeros_like(response_BT)
    before_BT[:, :-1] = response_BT[:, 1:] & (document_BT[:, 1:] == document_BT[:, :-1])
    return response_BT | before_BT


def final_accuracy(logit_BT: Tensor, batch: Batch) -> Tensor:
    """Return the share of responses whose last value is on the right side of 1/2 (above it if correct).

    The result is 0 if the batch has no response tokens.
    """
    last_BT = batch.response_BT & (remaining_response_tokens(batch.response_BT, batch.document_BT) == 1)
    return masked_mean(((logit_BT > 0) == is_correct(batch.reward_BT)).float(), last_BT)


def _cross_entropy(logit_BT: Tensor, target_BT: Tensor, batch: Batch) -> Tensor:
    loss_BT = F.binary_cross_entropy_with_logits(logit_BT, target_BT, reduction="none")
    return mean_of_row_means(loss_BT, trained_prefixes(batch))
