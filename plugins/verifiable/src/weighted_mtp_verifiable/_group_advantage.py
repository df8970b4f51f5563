"""One weight for each response, from its reward minus the mean reward of responses to the same problem.

The reward minus the mean reward of the group is the advantage of group-relative methods (Shao et al. 2024,
https://arxiv.org/abs/2402.03300, section 4.1.1), here without the division by the standard deviation of the
group (Liu et al. 2025, https://arxiv.org/abs/2503.20783, section 3.2). All tokens of a response have the same
weight, so this weighting is the baseline that a critic's weights must beat.

Shape letters: B batch rows, T positions, N all tokens of the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights, is_correct

from weighted_mtp_verifiable._reductions import masked_mean, remaining_response_tokens

if TYPE_CHECKING:
    from weighted_mtp_verifiable import GroupAdvantageOptions


class GroupAdvantage(WeightingStrategy):
    """Gives every token of a response with reward R the weight `w = clip(exp((R - baseline) / beta))`.

    Before clipping, the weight is positive because of the exponential, as in advantage-weighted regression;
    it is 1 if R equals the baseline and less than 1 if R is lower. With `positives_only`, incorrect responses
    have weight 0.

    The baseline is the mean reward of the batch's responses to the same problem. If the batch contains only
    one response to a problem, the baseline of this response is the mean reward of all responses in the batch;
    its own reward as the baseline would always give the weight 1. In batches that are drawn at random from
    many problems, most responses are the only response to their problem. The metric `lone_fraction` is the
    share of responses that are the only response to their problem in the batch.
    """

    def __init__(self, options: GroupAdvantageOptions) -> None:
        self._options = options

    def weigh(self, view: StepView) -> Weights:
        """Return weights, float32 `[B, T]`; all tokens of a response have the same weight."""
        assert view.reward_BT is not None
        assert view.group_BT is not None
        options = self._options
        reward_BT, response_BT = view.reward_BT.float(), view.response_BT
        # Means are over the last tokens of responses, so that each response counts once, whatever its length.
        last_BT = response_BT & (remaining_response_tokens(response_BT, view.document_BT) == 1)
        total_BT, count_BT = group_sums(reward_BT.where(last_BT, 0.0), last_BT.float(), view.group_BT)
        lone_BT = count_BT == 1
        group_mean_BT = total_BT / count_BT.clamp(min=1)
        advantage_BT = reward_BT - group_mean_BT.where(~lone_BT, masked_mean(reward_BT, last_BT))
        low, high = options.clip
        raw_BT = torch.exp(advantage_BT / options.beta)
        learnt_BT = response_BT & is_correct(reward_BT) if options.positives_only else response_BT
        return Weights(
            weight=raw_BT.clamp(low, high).where(learnt_BT, 0.0),
            metrics={
                "advantage_abs_mean": masked_mean(advantage_BT.abs(), last_BT),
                "clipped_fraction": masked_mean(((raw_BT < low) | (raw_BT > high)).float(), response_BT),
                "lone_fraction": masked_mean(lone_BT.float(), last_BT),
            },
        )


def group_sums(x_BT: Tensor, y_BT: Tensor, group_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each token the sums of x and of y over all tokens of its group in the batch.

    Group numbers are arbitrary; sorting converts them to consecutive indices without waiting for the device.
    """
    sorted_N, order_N = group_BT.reshape(-1).sort()
    new_N = F.pad((sorted_N[1:] != sorted_N[:-1]).long(), (1, 0))
    slot_N = torch.empty_like(order_N).scatter(0, order_N, new_N.cumsum(0))

    def over_groups(each_BT: Tensor) -> Tensor:
        each_N = each_BT.reshape(-1)
        return torch.zeros_like(each_N).index_add(0, slot_N, each_N)[slot_N].view_as(each_BT)

    return over_groups(x_BT), over_groups(y_BT)
