"""Whitening of advantages to mean 0 and standard deviation 1, with batch statistics or moving statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from weighted_mtp_core.api import WmtpError

_SMALLEST_STD = 1e-6  # below this, advantages differ only by rounding and are not scaled


def whiten(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return `(x - mean) / std`; a standard deviation of almost 0 is replaced with 1."""
    return (x - mean) / std.where(std > _SMALLEST_STD, 1.0)


class MovingStatistics:
    """Keeps exponential moving averages of the mean and the mean square of batches.

    Args:
        decay: Weight of the old averages in an update.
        device: Device of the averages.
    """

    def __init__(self, decay: float, *, device: torch.device) -> None:
        self._decay = decay
        # Decayed sums of 1, of the mean and of the mean square, which start at 0. Division by the first sum
        # removes the bias towards 0, as in Adam (Kingma and Ba 2015, section 3).
        self._moments = torch.zeros(3, device=device)

    def update(self, mean: Tensor, std: Tensor, *, where: Tensor) -> None:
        """Update the averages with a batch's statistics if `where`, a 0-dim bool tensor, is True."""
        now = torch.stack([torch.ones_like(mean), mean, std.square() + mean.square()])
        moved = self._decay * self._moments + (1 - self._decay) * now
        self._moments = torch.where(where, moved, self._moments)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Return the moving mean and standard deviation; both are 0 before the first update."""
        total, mean_sum, square_sum = self._moments.unbind()
        total = total.clamp(min=torch.finfo(torch.float32).tiny)
        mean = mean_sum / total
        return mean, (square_sum / total - mean.square()).clamp(min=0).sqrt()

    def state_dict(self) -> dict[str, Any]:
        """Return the moving averages."""
        return {"moments": self._moments.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the moving averages.

        Raises:
            WmtpError: The state is not a dict with `moments` as its only key.
        """
        if set(state) != {"moments"}:
            raise WmtpError(f"state of `td_error` must hold `moments`, got {sorted(state)}")
        self._moments = state["moments"].to(self._moments.device, copy=True)
