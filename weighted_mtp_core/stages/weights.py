"""What is checked and logged of every weighting's output.

Shape letters: B rows, T positions, K heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weighted_mtp_core.api import Weights
from weighted_mtp_core.errors import RunFailedError

_QUANTILES = (0.05, 0.5, 0.95)


def check_weights(weights: object, response_BT: Tensor, *, n_future: int, label: str) -> None:
    """Refuse what is no `Weights`, or holds no weight tensor of this batch.

    Args:
        weights: What the weighting returned; its tensor is float32 `[B, T]` or `[B, T, K]`.
        response_BT: The batch's response mask.
        n_future: K.
        label: Names the weighting, its plugin, distribution and version.

    Raises:
        RunFailedError: Wrong type, shape, dtype or values, or the weights carry a gradient.
    """
    if not isinstance(weights, Weights):
        raise RunFailedError(f"{label} returned a `{type(weights).__name__}`, expected `Weights`")
    weight = weights.weight
    if not isinstance(weight, Tensor):
        raise RunFailedError(f"{label} returned weights in a `{type(weight).__name__}`, expected a tensor")
    expected = tuple(response_BT.shape)
    if tuple(weight.shape) not in {expected, (*expected, n_future)}:
        fault = f"shape {tuple(weight.shape)}, expected {expected} or {(*expected, n_future)}"
    elif weight.dtype != torch.float32:
        fault = f"dtype {weight.dtype}, expected torch.float32"
    elif weight.requires_grad:
        fault = "a gradient; weights must be detached"
    elif not bool(torch.isfinite(weight).all()):
        fault = "NaN or infinity in them"
    elif bool((weight < 0).any()):
        fault = "a negative weight in them"
    else:
        return
    raise RunFailedError(f"{label} returned weights with {fault}")


def weight_metrics(weight_BTK: Tensor, target_BTK: Tensor) -> dict[str, Tensor]:
    """Describe the weights of the counted pairs, as float32 scalars.

    `weight_entropy` is the entropy of w / sum w over the pairs divided by ln(number of pairs): 1 for equal
    weights, 0 for all weight on one pair. `effective_sample_share` is (sum w)^2 / sum w^2 (Kish 1965) divided
    by the number of pairs.
    """
    weight_N = weight_BTK[target_BTK].float()
    if not len(weight_N):
        return {}
    total = weight_N.sum()
    count = weight_N.new_tensor(float(len(weight_N)))
    share_N = weight_N / total.clamp(min=torch.finfo(torch.float32).tiny)
    entropy = -torch.special.xlogy(share_N, share_N).sum() / count.log().clamp(min=1e-9)
    quantiles = torch.quantile(weight_N, weight_N.new_tensor(_QUANTILES))
    return {
        "weight_mean": total / count,
        "weight_entropy": entropy,
        "effective_sample_share": total.square() / (weight_N.square().sum() * count).clamp(min=1e-30),
        **{f"weight_p{int(100 * q):02d}": value for q, value in zip(_QUANTILES, quantiles, strict=True)},
    }
