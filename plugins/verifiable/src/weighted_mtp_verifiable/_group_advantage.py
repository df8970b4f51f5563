"""One weight for each whole response: how much better it did than others to the same problem.

That is the advantage of group-relative methods (Shao et al. 2024, https://arxiv.org/abs/2402.03300, 4.1.1),
not divided by the group's deviation (Liu et al. 2025, https://arxiv.org/abs/2503.20783, 3.2). It knows
nothing of positions, and so is the simple arm that a critic's weights must beat.

Shape letters: B batch rows, T positions, N all tokens of the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights

from weighted_mtp_verifiable._advantage import remaining
from weighted_mtp_verifiable._objective import mean

if TYPE_CHECKING:
    from weighted_mtp_verifiable import GroupAdvantageOptions


class GroupAdvantage(WeightingStrategy):
    """Weighs every token of a response with `w = clip(exp((R - baseline) / beta))`.

    A weight is never negative, so a signed advantage becomes an exponential one, as in advantage-weighted
    regression: 1 for a response that did as well as its group, less for a worse one, never against it.

    The baseline is the mean reward of the batch's responses to the same problem. A response that is alone
    with its problem would be its own mean, and its reward would say nothing: its baseline is the mean reward
    of all responses in the batch. That is the usual case with batches drawn at random from many problems;
    `lone_fraction` says how usual.
    """

    def __init__(self, options: GroupAdvantageOptions) -> None:
        self._options = options

    def weigh(self, view: StepView) -> Weights:
        """Return `[B, T]` weights, equal within each response."""
        assert view.reward_BT is not None
        assert view.group_BT is not None
        options = self._options
        reward_BT, response_BT = view.reward_BT.float(), view.response_BT
        # Each response counts once, however long it is: with its last token.
        last_BT = response_BT & (remaining(response_BT, view.document_BT) == 1)
        total_BT, count_BT = group_sums(reward_BT.where(last_BT, 0.0), last_BT.float(), view.group_BT)
        lone_BT = count_BT == 1
        baseline_BT = (total_BT / count_BT.clamp(min=1)).where(~lone_BT, mean(reward_BT, last_BT))
        advantage_BT = reward_BT - baseline_BT
        low, high = options.clip
        raw_BT = torch.exp(advantage_BT / options.beta)
        learnt_BT = response_BT & (reward_BT > 0) if options.positives_only else response_BT
        return Weights(
            weight=raw_BT.clamp(low, high).where(learnt_BT, 0.0),
            metrics={
                "advantage_abs_mean": mean(advantage_BT.abs(), last_BT),
                "clipped_fraction": mean(((raw_BT < low) | (raw_BT > high)).float(), response_BT),
                "lone_fraction": mean(lone_BT.float(), last_BT),
            },
        )


def group_sums(x_BT: Tensor, y_BT: Tensor, group_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each token the sums of x and of y over all tokens of its group, wherever they are.

    Group numbers may be any; sorting them gives slots without asking the device how many there are.
    """
    sorted_N, order_N = group_BT.reshape(-1).sort()
    new_N = F.pad((sorted_N[1:] != sorted_N[:-1]).long(), (1, 0))
    slot_N = torch.empty_like(order_N).scatter(0, order_N, new_N.cumsum(0))

    def over_groups(each_BT: Tensor) -> Tensor:
        each_N = each_BT.reshape(-1)
        return torch.zeros_like(each_N).index_add(0, slot_N, each_N)[slot_N].view_as(each_BT)

    return over_groups(x_BT), over_groups(y_BT)
