"""Random-matched control: random weights with the mean and the standard deviation of the wrapped weights.

Shape letters: B batch rows, T positions, C columns (the K heads, or 1 for weights by token).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights

from weighted_mtp_controls._random_numbers import uniform
from weighted_mtp_controls._wrapper import Wrapper, target_mask

_HALVINGS = 24
# Limits of log2(s / d), where s and d are the standard deviations before and after clipping. At 14, clipping
# moves almost all numbers to a bound.
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -1.0, 14.0


class RandomMatched(Wrapper):
    """Draws random weights with the mean and standard deviation of a batch's wrapped weights, in their range.

    The weights are `clip(m + s z, low, high)`, where z is standard normal, and low and high are the smallest
    and the largest wrapped weight of the batch's targets. The numbers m and s are chosen such that the mean
    and the standard deviation match after clipping, because clipping changes them: for example, E[exp z] is
    1.649, but E[clip(exp z, 0.1, 3)] is 1.297.
    """

    def __init__(self, of: WeightingStrategy, *, seed: int) -> None:
        super().__init__([of])
        self._seed = seed

    def weigh(self, view: StepView) -> Weights:
        """Return random weights, and the metrics of the wrapped weighting."""
        weights = self._wrapped[0].weigh(view)
        mask = target_mask(view, weights.weight)
        heads = 1 if weights.weight.ndim == 2 else view.n_future
        uniform_BTC = uniform(view, seed=self._seed, heads=heads)
        normal, device = torch.special.ndtri(uniform_BTC).view(weights.weight.shape), uniform_BTC.device
        drawn = match(normal, like=weights.weight.to(device).double(), mask=mask.to(device))
        return Weights(weight=drawn.float().to(weights.weight.device), metrics=weights.metrics)


def match(normal: Tensor, *, like: Tensor, mask: Tensor) -> Tensor:
    """Return `clip(m + s * normal, low, high)` with the mean and the standard deviation of `like`.

    Here low and high are the smallest and the largest entry of `like`. Only entries where the mask is True
    count; the others are 0 in the result. For each s, exactly one m gives the right mean, and the standard
    deviation grows with s. So two nested bisections find s and m, even if almost all entries of `like` are
    equal to low or high.
    """
    mean, std = _moments(like, mask)
    low = like.where(mask, torch.inf).amin()
    high = like.where(mask, -torch.inf).amax()
    largest = normal.abs().where(mask, 0.0).amax()
    total = mean * mask.sum()

    def with_mean(scale: Tensor) -> Tensor:
        scaled = scale * normal

        def sums_to_less(shift: Tensor) -> Tensor:
            return ((shift + scaled).clamp(low, high) * mask).sum() < total

        shift = _bisect(sums_to_less, low - scale * largest, high + scale * largest)
        return (shift + scaled).clamp(low, high)

    exponent = _bisect(
        lambda exponent: _moments(with_mean(std * 2**exponent), mask)[1] < std,
        torch.full_like(std, _SMALLEST_EXPONENT),
        torch.full_like(std, _LARGEST_EXPONENT),
    )
    return with_mean(std * 2**exponent).where(mask, 0.0)


def _bisect(too_low: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return the number between `low` and `high` at which `too_low` changes to False, found by bisection.

    The computation never waits for the device.
    """
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = too_low(middle)
        low, high = middle.where(below, low), high.where(below, middle)
    return (low + high) / 2


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    count = mask.sum().clamp(min=1)
    mean = x.where(mask, 0.0).sum() / count
    return mean, ((x - mean).square().where(mask, 0.0).sum() / count).sqrt()
