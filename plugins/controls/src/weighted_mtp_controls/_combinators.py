"""Combinators: weightings that are built from other weightings.

Shape letters: B batch rows, T positions, K heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights

from weighted_mtp_controls._wrapper import Wrapper, target_mask


class Product(Wrapper):
    """Multiplies weights; a factor `[B, T]` is expanded to `[B, T, K]` if another factor has this shape."""

    def weigh(self, view: StepView) -> Weights:
        """Return the product; the names of the metrics of factor i (counted from 1) get the suffix `_i`."""
        each = [weighting.weigh(view) for weighting in self._wrapped]
        factors: list[Tensor] = [weights.weight for weights in each]
        if any(factor.ndim == 3 for factor in factors):
            factors = [view.to_pairs(factor) if factor.ndim == 2 else factor for factor in factors]
        return Weights(
            weight=math.prod(factors[1:], start=factors[0]),
            metrics={
                f"{name}_{i}": value
                for i, weights in enumerate(each, start=1)
                for name, value in weights.metrics.items()
            },
        )


class Clip(Wrapper):
    """Clips the weights of targets to `[low, high]`."""

    def __init__(self, of: WeightingStrategy, *, low: float, high: float) -> None:
        super().__init__([of])
        self._low, self._high = low, high

    def weigh(self, view: StepView) -> Weights:
        """Return the clipped weights; the metrics also contain the share of weights outside the range."""
        weights = self._wrapped[0].weigh(view)
        mask = target_mask(view, weights.weight)
        outside = (weights.weight < self._low) | (weights.weight > self._high)
        return Weights(
            weight=weights.weight.clamp(self._low, self._high).where(mask, 0.0),
            metrics={
                **weights.metrics,
                "outside_clip_fraction": (outside & mask).sum() / mask.sum().clamp(min=1),
            },
        )


class Anneal(Wrapper):
    """Mixes uniform weights of 1 with the wrapped weights.

    The share of the wrapped weights grows linearly from 0 at step `start` to 1 at step `end`.
    """

    def __init__(self, of: WeightingStrategy, *, start: int, end: int) -> None:
        super().__init__([of])
        self._start, self._end = start, end

    def weigh(self, view: StepView) -> Weights:
        """Return the mixed weights; the metrics also contain the share of the wrapped weights."""
        weights = self._wrapped[0].weigh(view)
        share = min(max((view.step - self._start) / (self._end - self._start), 0.0), 1.0)
        ones = target_mask(view, weights.weight).to(torch.float32)
        return Weights(
            weight=(1 - share) * ones + share * weights.weight,
            metrics={**weights.metrics, "anneal_share": share},
        )
