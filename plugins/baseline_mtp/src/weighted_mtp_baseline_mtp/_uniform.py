"""Uniform weights: unweighted multi-token prediction.

The loss is eq. 2 of Gloeckle et al. 2024, "Better & Faster Large Language Models via Multi-token Prediction"
(https://arxiv.org/abs/2404.19737).

Shape letters: B batch rows, T positions.
"""

from __future__ import annotations

import torch
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights


class Uniform(WeightingStrategy):
    """Gives each response token the weight 1 and all other tokens 0."""

    def weigh(self, view: StepView) -> Weights:
        """Return weights `[B, T]`, indexed by the target token: the same for every head that predicts it."""
        return Weights(weight=view.response_BT.to(torch.float32))
