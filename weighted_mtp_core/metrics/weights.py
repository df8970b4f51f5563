"""Metrics of token weights.

Shape letters: N pairs of a source and a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PERCENTILES = (5, 50, 95)
_ROUNDING = 1e-10  # weights with a smaller relative variance differ only by rounding


def weight_metrics(weight_N: Tensor) -> dict[str, Tensor]:
    """Return metrics of the weights w of all pairs that count, as float32 scalars; empty if no pair counts.

    `weight_entropy` is the entropy of |w| / sum |w| over the pairs, divided by ln(number of pairs): 1 if all
    |w| are equal, 0 if one pair has all the weight. `effective_sample_share` is (sum |w|)^2 / sum w^2,
    divided by the number of pairs (Kish 1965). `weight_mean` is the mean of w, and `weight_p05`, `weight_p50`
    and `weight_p95` are percentiles of w.
    """
    if not len(weight_N):
        return {}
    weight_N = weight_N.float()
    size_N = weight_N.abs()
    total = size_N.sum()
    count = weight_N.new_full((), len(weight_N))
    share_N = size_N / total.clamp(min=torch.finfo(torch.float32).tiny)
    entropy = -torch.special.xlogy(share_N, share_N).sum() / count.log().clamp(min=1e-9)
    return {
        "weight_mean": weight_N.sum() / count,
        "weight_entropy": entropy,
        "effective_sample_share": total.square() / (weight_N.square().sum() * count).clamp(min=1e-30),
        **{f"weight_p{percent:02d}": value for percent, value in _percentiles(weight_N).items()},
    }


def share_between_responses(weight_N: Tensor, response_N: Tensor, *, count: int) -> Tensor:
    """Return the share of the variance of the weights that lies between responses, a float32 scalar.

    The share follows from the law of total variance. The share is 1 if weights differ only between responses,
    and 0 if all responses have the same mean weight, for example if all weights are equal.

    Args:
        weight_N: The weight of each pair.
        response_N: The number of the response of each pair, int64, from 0 to `count` - 1.
        count: Upper limit of `response_N`, exclusive.
    """
    weight_N = weight_N.float()
    centred_N = weight_N - weight_N.mean()
    zero_R = weight_N.new_zeros(count)
    sum_R = zero_R.index_add(0, response_N, centred_N)
    pairs_R = zero_R.index_add(0, response_N, torch.ones_like(centred_N))
    between, total = (sum_R.square() / pairs_R.clamp(min=1)).sum(), centred_N.square().sum()
    varies = total > _ROUNDING * weight_N.square().sum()
    return torch.where(varies, between / total, 0.0)


def _percentiles(weight_N: Tensor) -> dict[int, Tensor]:
    """Return interpolated percentiles without `torch.quantile`, which refuses more than 2^24 numbers."""
    sorted_N, last = weight_N.sort().values, len(weight_N) - 1
    found = {}
    for percent in _PERCENTILES:
        below, rest = divmod(percent * last, 100)
        found[percent] = torch.lerp(sorted_N[below], sorted_N[min(below + 1, last)], rest / 100)
    return found
