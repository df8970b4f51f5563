"""What the value head may be trained for: three losses on the log-odds of every prefix.

Shape letters: B batch rows (P pairs of them), T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from weighted_mtp_core.api import Batch

from weighted_mtp_verifiable._advantage import advantages, discounted_sums, remaining, td_errors

CORRECT = 0.5  # rewards from here on count as correct


def monte_carlo(logit_BT: Tensor, batch: Batch, *, lam: float) -> Tensor:
    """Return the binary cross-entropy of each prefix's value with the reward R (Cobbe et al. 2021, 4.2)."""
    del lam
    return _cross_entropy(logit_BT, outcome(batch), batch)


def lambda_return(logit_BT: Tensor, batch: Batch, *, lam: float) -> Tensor:
    """Return the binary cross-entropy of each prefix's value with its lambda-return.

    The lambda-return (Sutton and Barto 2018, eq. 12.2) of the prefix that ends at t is `V_t + A_{t+1}`, with
    the critic's own values held fixed; that of the whole response is R.
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
    ended_BT = remaining(batch.response_BT, batch.document_BT) <= 1
    return _cross_entropy(logit_BT, return_BT.where(~ended_BT, outcome(batch)), batch)


def bradley_terry(logit_BT: Tensor, batch: Batch, *, lam: float) -> Tensor:
    """Return `-log sigmoid(s_correct - s_incorrect)` with s the log-odds behind the last token.

    This is the loss of reward models (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1). It ranks responses
    to one problem, so values of different problems have no common scale.
    """
    del lam
    position_T = torch.arange(logit_BT.shape[1], device=logit_BT.device)
    last_B = (batch.response_BT * position_T).argmax(dim=1)
    final_B = logit_BT.gather(1, last_B[:, None]).squeeze(1)
    answered_P = batch.response_BT.any(dim=1).view(-1, 2).all(dim=1)
    correct_P, incorrect_P = final_B.view(-1, 2).unbind(dim=1)
    return F.softplus(incorrect_P - correct_P).where(answered_P, 0.0).mean()


def outcome(batch: Batch) -> Tensor:
    """Return the reward of a token's document, on its prompt too; 0 behind the response."""
    rewards_BT = batch.reward_BT.where(batch.response_BT, 0.0)
    total_BT = discounted_sums(rewards_BT, document_BT=batch.document_BT, discount=1.0)
    return total_BT / remaining(batch.response_BT, batch.document_BT).clamp(min=1)


def prefixes(batch: Batch) -> Tensor:
    """Return where a value is trained: on response tokens and on the last token of the prompt."""
    document_BT, response_BT = batch.document_BT, batch.response_BT
    before_BT = torch.zeros_like(response_BT)
    before_BT[:, :-1] = response_BT[:, 1:] & (document_BT[:, 1:] == document_BT[:, :-1])
    return response_BT | before_BT


def final_accuracy(logit_BT: Tensor, batch: Batch) -> Tensor:
    """Return the share of responses whose final value lies on the reward's side of 1/2."""
    last_BT = batch.response_BT & (remaining(batch.response_BT, batch.document_BT) == 1)
    return mean(((logit_BT > 0) == (batch.reward_BT >= CORRECT)).float(), last_BT)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean where the mask is True; 0 (with a gradient of 0) where it never is."""
    return x.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def row_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over all rows of each row's mean where the mask is True (0 if it never is).

    Means over rows, unlike means over tokens, are the same however a batch is cut into parts of rows.
    """
    total_B = x_BT.where(mask_BT, 0.0).sum(dim=1)
    return (total_B / mask_BT.sum(dim=1).clamp(min=1)).mean()


def _cross_entropy(logit_BT: Tensor, target_BT: Tensor, batch: Batch) -> Tensor:
    loss_BT = F.binary_cross_entropy_with_logits(logit_BT, target_BT, reduction="none")
    return row_mean(loss_BT, prefixes(batch))
