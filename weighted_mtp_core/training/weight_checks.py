"""What is checked and logged of every weighting's output.

Shape letters: B rows, T positions, K heads.
"""

from __future__ import annotations

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from weighted_mtp_core.api import Weights
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.model.targets import pair_index

_QUANTILES = (0.05, 0.5, 0.95)


_LOOK_EVERY = 10  # steps between two looks at the values on an accelerator: each one waits for the device


def check_weights(weights: object, response_BT: Tensor, *, n_future: int, label: str) -> None:
    """Refuse what is no `Weights`, or holds no weight tensor of this batch; the device is not asked.

    Args:
        weights: What the weighting returned; its tensor is float32 `[B, T]` or `[B, T, K]`.
        response_BT: The batch's response mask.
        n_future: K.
        label: Names the weighting, its plugin, distribution and version.

    Raises:
        RunFailedError: Wrong type, shape or dtype, or the weights carry a gradient.
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
    else:
        return
    raise RunFailedError(f"{label} returned weights with {fault}")


@define(kw_only=True, eq=False)
class ValueCheck:
    """Refuses weights that are negative or not finite.

    On an accelerator it looks now and then only. Until then, weights that are not finite make a step that is
    skipped, and negative ones still end the run.

    Attributes:
        label: Names the weighting, its plugin, distribution and version.
    """

    label: str
    _worst: Tensor | None = field(init=False, default=None)

    def note(self, weight: Tensor) -> None:
        """Remember on the device what is wrong with a step's weights."""
        found = torch.where(torch.isfinite(weight).all(), (weight < 0).any().long(), 2)
        self._worst = found if self._worst is None else torch.maximum(self._worst, found)

    def due(self, step: int, steps: int) -> bool:
        """Say whether it is time to look."""
        on_host = self._worst is None or self._worst.device.type == "cpu"
        return on_host or (step + 1) % _LOOK_EVERY == 0 or step + 1 >= steps

    def look(self) -> None:
        """Read what was noted since the last look; this waits for the device.

        Raises:
            RunFailedError: Some weights were negative or not finite.
        """
        worst = 0 if self._worst is None else int(self._worst)
        self._worst = None
        if worst:
            fault = "NaN or infinity" if worst == 2 else "a negative weight"
            raise RunFailedError(f"{self.label} returned weights with {fault} in them")


def weight_metrics(
    weight_BTK: Tensor, target_BTK: Tensor, *, preceding_BT: NDArray[np.int64] | None = None
) -> dict[str, Tensor]:
    """Describe the weights of the counted pairs, as float32 scalars.

    `weight_entropy` is the entropy of w / sum w over the pairs divided by ln(number of pairs): 1 for equal
    weights, 0 for all weight on one pair. `effective_sample_share` is (sum w)^2 / sum w^2 (Kish 1965) divided
    by the number of pairs.
    """
    weight_N = weight_BTK.flatten()[pair_index(target_BTK, preceding_BT=preceding_BT)].float()
    if not len(weight_N):
        return {}
    total = weight_N.sum()
    count = weight_N.new_full((), len(weight_N))
    share_N = weight_N / total.clamp(min=torch.finfo(torch.float32).tiny)
    entropy = -torch.special.xlogy(share_N, share_N).sum() / count.log().clamp(min=1e-9)
    asked = torch.tensor(_QUANTILES).to(weight_N.device, non_blocking=True)
    quantiles = torch.quantile(weight_N, asked)
    return {
        "weight_mean": total / count,
        "weight_entropy": entropy,
        "effective_sample_share": total.square() / (weight_N.square().sum() * count).clamp(min=1e-30),
        **{f"weight_p{int(100 * q):02d}": value for q, value in zip(_QUANTILES, quantiles, strict=True)},
    }
