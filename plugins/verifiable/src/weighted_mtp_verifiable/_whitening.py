"""Whitening of advantages: mean 0 and standard deviation 1, by statistics of the batch or moving ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from weighted_mtp_core.api import WmtpError

_SMALLEST_STD = 1e-6  # below this, advantages differ by rounding only and are left unscaled


def whiten(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return `(x - mean) / std`."""
    return (x - mean) / std.where(std > _SMALLEST_STD, 1.0)


class MovingStatistics:
    """Exponential moving averages of the mean and the mean square of batches.

    Args:
        decay: Weight of the old averages in an update.
        device: Device of the averages.
    """

    def __init__(self, decay: float, *, device: torch.device) -> None:
        self._decay = decay
        # Decayed sums of 1, the mean and the mean square. Dividing by the first removes the bias of the zero
        # start (as in Adam, Kingma and Ba 2015, section 3).
        self._moments = torch.zeros(3, device=device)

    def update(self, mean: Tensor, std: Tensor, *, where: Tensor) -> None:
        """Add a batch's mean and standard deviation if the 0-dim bool tensor `where` is True."""
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
        """Return the averages."""
        return {"moments": self._moments.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the averages.

        Raises:
            WmtpError: The state is that of something else.
        """
        if set(state) != {"moments"}:
            raise WmtpError(f"state of `td_error` must hold `moments`, got {sorted(state)}")
        self._moments = state["moments"].to(self._moments.device, copy=True)
