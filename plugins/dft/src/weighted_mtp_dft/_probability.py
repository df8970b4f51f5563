"""Weights by probability: `w = max(p(target), floor)`, where p is the policy's current prediction.

With `floor = 0`, the loss is eq. 9 of Wu et al. 2025, "On the Generalization of SFT: A Reinforcement Learning
Perspective with Reward Rectification" (https://arxiv.org/abs/2508.05629). In the gradient of the unweighted
loss -log p(target), each token has the factor 1 / p(target); the weight p(target) cancels this factor. The
weights of each head come from the probabilities that this head predicts.

Shape letters: B batch rows, T positions, K heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights

if TYPE_CHECKING:
    from weighted_mtp_dft import ProbabilityOptions


class Probability(WeightingStrategy):
    """Weighs each pair (a source position and a head) with the probability that the head gives its target."""

    def __init__(self, options: ProbabilityOptions) -> None:
        self._floor = options.floor

    def weigh(self, view: StepView) -> Weights:
        """Return weights `[B, T, K]` between `floor` and 1; 0 for pairs without a target."""
        assert view.token_loss_BTK is not None
        target_BTK = view.target_BTK
        probability_BTK = torch.exp(-view.token_loss_BTK)
        weight_BTK = probability_BTK.clamp(min=self._floor).where(target_BTK, 0.0)
        count = target_BTK.sum().clamp(min=1)
        return Weights(
            weight=weight_BTK,
            metrics={
                "own_probability_mean": probability_BTK.where(target_BTK, 0.0).sum() / count,
                "floored_fraction": ((probability_BTK < self._floor) & target_BTK).sum() / count,
            },
        )
