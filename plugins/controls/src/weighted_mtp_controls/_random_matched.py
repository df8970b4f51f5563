"""The control that keeps an arm's mean, standard deviation and range, and nothing else.

Shape letters: B batch rows, T positions, C columns: K heads, or 1 for weights by token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights

from weighted_mtp_controls._random_numbers import uniform
from weighted_mtp_controls._wrapper import Wrapper, counted

_HALVINGS = 24
# Deviation before clipping, in powers of two of the one after: 2^14 leaves hardly a number off the bounds.
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -1.0, 14.0


class RandomMatched(Wrapper):
    """Draws weights `clip(m + s z)`, z normal, with the moments of the arm's weights *after* clipping.

    Mean and deviation are those of the arm over the whole batch, and so are the bounds. To match moments
    before clipping would change them: E[clip(exp z, 0.1, 3)] is 1.296, E[exp z] 1.649.
    """

    def __init__(self, arm: WeightingStrategy, *, seed: int) -> None:
        super().__init__([arm])
        self._seed = seed

    def weigh(self, view: StepView) -> Weights:
        """Return random weights like the arm's, with the arm's metrics."""
        weights = self._parts[0].weigh(view)
        mask = counted(view, weights.weight)
        heads = 1 if weights.weight.ndim == 2 else view.n_future
        uniform_BTC = uniform(view, seed=self._seed, heads=heads)
        normal, device = torch.special.ndtri(uniform_BTC).view(weights.weight.shape), uniform_BTC.device
        drawn = match(normal, like=weights.weight.to(device).double(), mask=mask.to(device))
        return Weights(weight=drawn.float().to(weights.weight.device), metrics=weights.metrics)


def match(normal: Tensor, *, like: Tensor, mask: Tensor) -> Tensor:
    """Return `clip(m + s * normal)` with mean, deviation and range of `like` where the mask is True.

    It is 0 elsewhere. For each s there is one m that gives the mean, and the deviation grows with s: two
    nested bisections, which also end where almost everything lies on a bound, as with weights 0 and 1.
    """
    mean, std = _moments(like, mask)
    low = like.where(mask, torch.inf).amin()
    high = like.where(mask, -torch.inf).amax()
    reach = normal.abs().where(mask, 0.0).amax()
    total = mean * mask.sum()

    def with_mean(scale: Tensor) -> Tensor:
        scaled = scale * normal

        def sums_to_less(shift: Tensor) -> Tensor:
            return ((shift + scaled).clamp(low, high) * mask).sum() < total

        shift = _bisect(sums_to_less, low - scale * reach, high + scale * reach)
        return (shift + scaled).clamp(low, high)

    exponent = _bisect(
        lambda exponent: _moments(with_mean(std * 2**exponent), mask)[1] < std,
        torch.full_like(std, _SMALLEST_EXPONENT),
        torch.full_like(std, _LARGEST_EXPONENT),
    )
    return with_mean(std * 2**exponent).where(mask, 0.0)


def _bisect(too_low: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return where `too_low` turns False between two bounds, without waiting for the device."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = too_low(middle)
        low, high = middle.where(below, low), high.where(below, middle)
    return (low + high) / 2


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    count = mask.sum().clamp(min=1)
    mean = x.where(mask, 0.0).sum() / count
    return mean, ((x - mean).square().where(mask, 0.0).sum() / count).sqrt()
