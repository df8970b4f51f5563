"""Uniform weights: unweighted multi-token prediction.

With uniform weights, the loss is eq. 2 of Gloeckle et al. 2024, "Better & Faster Large Language Models via
Multi-token Prediction" (https://arxiv.org/abs/2404.19737).

Shape letters: B batch rows, T positions.
"""

from __future__ import annotations

import torch
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights


class Uniform(WeightingStrategy):
    """Gives each response token the weight 1 and each other token the weight 0."""

    def weigh(self, view: StepView) -> Weights:
        """Return one weight per target token, float32 `[B, T]`; every head uses the same weights."""
        return Weights(weight=view.response_BT.to(torch.float32))
