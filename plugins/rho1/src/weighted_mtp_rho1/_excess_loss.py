"""Weights by excess loss, which is the policy's loss minus a reference model's loss of the same token.

A large excess loss shows that a token can still be learnt. With `selection = "top"`, training uses only a
given share of the targets, those with the largest excess loss (Lin et al. 2024, "Rho-1: Not All Tokens Are
What You Need", https://arxiv.org/abs/2404.07965, eq. 3 and 4). The reference model has one head, so the loss
of every head is compared with the reference model's next-token loss of the target.

Shape letters: B batch rows, T positions, K heads, N candidates of one selection, C selections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights

if TYPE_CHECKING:
    from weighted_mtp_rho1 import ExcessLossOptions


class ExcessLoss(WeightingStrategy):
    """Gives the batch's targets with the largest excess loss more weight than all other targets."""

    def __init__(self, options: ExcessLossOptions) -> None:
        self._options = options

    def weigh(self, view: StepView) -> Weights:
        """Return weights, float32: `[B, T, K]` for `per = "head"`, `[B, T]` for `per = "target"`."""
        assert view.token_loss_BTK is not None
        assert view.reference_loss_BT is not None
        if self._options.per == "head":
            excess = view.token_loss_BTK - view.to_pairs(view.reference_loss_BT)
            is_target = view.target_BTK
        else:
            # The reference model predicts the next token, as head 1 does.
            excess = (view.to_targets(view.token_loss_BTK)[..., 0] - view.reference_loss_BT)[..., None]
            is_target = view.to_targets(view.target_BTK.float())[..., :1] > 0
        weight_NC = self._select(excess.flatten(0, 1), is_target.flatten(0, 1))
        weight = weight_NC.view(excess.shape)
        total = is_target.sum().clamp(min=1)
        return Weights(
            weight=weight if self._options.per == "head" else weight.squeeze(-1),
            metrics={
                "excess_loss_mean": excess.where(is_target, 0.0).sum() / total,
                "selected_fraction": (weight >= 0.5).sum() / total,
            },
        )

    def _select(self, excess_NC: Tensor, target_NC: Tensor) -> Tensor:
        """Return weights `[N, C]` in [0, 1] that grow with the excess loss; 0 where there is no target.

        A target whose excess loss is NaN gets the weight NaN, which core refuses.
        """
        kept_C = (self._options.keep * target_NC.sum(dim=0)).round().clamp(min=1)
        ranked_NC = excess_NC.where(target_NC, -torch.inf)
        order_NC = ranked_NC.argsort(dim=0, descending=True, stable=True)
        if self._options.selection == "top":
            rank_NC = order_NC.argsort(dim=0)
            selected_NC = ((rank_NC < kept_C) & target_NC).float()
            return selected_NC.where(~(excess_NC.isnan() & target_NC), torch.nan)
        threshold_1C = ranked_NC.gather(0, order_NC.gather(0, (kept_C[None] - 1).long()))
        soft_NC = torch.sigmoid((excess_NC - threshold_1C) / self._options.temperature)
        return soft_NC.where(target_NC, 0.0)
