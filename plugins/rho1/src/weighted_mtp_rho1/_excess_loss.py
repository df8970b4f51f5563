"""Weights by excess loss: what the policy still has to learn and a reference model shows to be learnable.

Lin et al. 2024, "Rho-1: Not All Tokens Are What You Need" (https://arxiv.org/abs/2404.07965), eq. 3 and 4:
the excess of the policy's loss over the reference model's, and training on the share of targets where it is
largest. The reference model has one head, so head k's loss is compared with its loss of the same target.

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
    """Keeps the targets with the largest excess loss, in the whole batch."""

    def __init__(self, options: ExcessLossOptions) -> None:
        self._options = options

    def weigh(self, view: StepView) -> Weights:
        """Return `[B, T, K]` weights for a selection per head, `[B, T]` for one per target."""
        assert view.token_loss_BTK is not None
        assert view.reference_loss_BT is not None
        if self._options.per == "head":
            excess = view.token_loss_BTK - view.to_pairs(view.reference_loss_BT)
            counts = view.target_BTK
        else:
            # Of the policy's losses of a token, head 1's is the one that the reference model's compares with.
            excess = (view.to_targets(view.token_loss_BTK)[..., 0] - view.reference_loss_BT)[..., None]
            counts = view.to_targets(view.target_BTK.float())[..., :1] > 0
        weight_NC = self._select(excess.flatten(0, 1), counts.flatten(0, 1))
        weight = weight_NC.view(excess.shape)
        total = counts.sum().clamp(min=1)
        return Weights(
            weight=weight if self._options.per == "head" else weight.squeeze(-1),
            metrics={
                "excess_loss_mean": excess.where(counts, 0.0).sum() / total,
                "selected_fraction": (weight >= 0.5).sum() / total,
            },
        )

    def _select(self, excess_NC: Tensor, counts_NC: Tensor) -> Tensor:
        """Return weights in [0, 1] for each column's largest share; 0 where nothing counts."""
        kept_C = (self._options.keep * counts_NC.sum(dim=0)).round().clamp(min=1)
        ranked_NC = excess_NC.where(counts_NC, -torch.inf)
        order_NC = ranked_NC.argsort(dim=0, descending=True, stable=True)
        if self._options.selection == "top":
            rank_NC = order_NC.argsort(dim=0)
            return ((rank_NC < kept_C) & counts_NC).float()
        last_1C = ranked_NC.gather(0, order_NC.gather(0, (kept_C[None] - 1).long()))
        soft_NC = torch.sigmoid((excess_NC - last_1C) / self._options.temperature)
        return soft_NC.where(counts_NC, 0.0)
