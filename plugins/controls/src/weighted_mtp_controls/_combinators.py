"""One weighting made of others.

Shape letters: B batch rows, T positions, K heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights

from weighted_mtp_controls._wrapper import Wrapper, counted


class Product(Wrapper):
    """Multiplies weights; those by token are laid onto pairs if any other is by pair."""

    def weigh(self, view: StepView) -> Weights:
        """Return the product; metrics of part i (from 1) end in `_i`."""
        each = [part.weigh(view) for part in self._parts]
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

    def __init__(self, inner: WeightingStrategy, *, low: float, high: float) -> None:
        super().__init__([inner])
        self._low, self._high = low, high

    def weigh(self, view: StepView) -> Weights:
        """Return the clipped weights and how many of them were outside."""
        weights = self._parts[0].weigh(view)
        mask = counted(view, weights.weight)
        outside = (weights.weight < self._low) | (weights.weight > self._high)
        return Weights(
            weight=weights.weight.clamp(self._low, self._high).where(mask, 0.0),
            metrics={
                **weights.metrics,
                "outside_clip_fraction": (outside & mask).sum() / mask.sum().clamp(min=1),
            },
        )


class Anneal(Wrapper):
    """Mixes weights of 1 with the inner ones, whose share grows linearly from step `start` to step `end`."""

    def __init__(self, inner: WeightingStrategy, *, start: int, end: int) -> None:
        super().__init__([inner])
        self._start, self._end = start, end

    def weigh(self, view: StepView) -> Weights:
        """Return the mixture and the share of the inner weights."""
        weights = self._parts[0].weigh(view)
        share = min(max((view.step - self._start) / (self._end - self._start), 0.0), 1.0)
        ones = counted(view, weights.weight).to(torch.float32)
        return Weights(
            weight=(1 - share) * ones + share * weights.weight,
            metrics={**weights.metrics, "anneal_share": share},
        )
