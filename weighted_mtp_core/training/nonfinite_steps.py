"""Skips training steps with a non-finite loss or gradient, and counts the skipped steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from weighted_mtp_core.runtime.device import READ_EVERY


@define(kw_only=True, eq=False)
class NonfiniteSteps:
    """Counts skipped steps on the device, so that the host need not wait for the device at each step.

    Attributes:
        limit: Number of consecutive skipped steps after which the run ends.
        device: The device that trains.
    """

    limit: int
    device: torch.device
    _total: Tensor = field(init=False)
    _in_a_row: Tensor = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._total = torch.zeros((), device=self.device)
        self._in_a_row = torch.zeros((), device=self.device)

    @property
    def total(self) -> int:
        """Number of steps that were skipped."""
        return int(self._total)

    def skip_if_not_finite(
        self, optimisers: Iterable[torch.optim.Optimizer], loss: Tensor | float, gradient_norm: Tensor
    ) -> None:
        """Make the next step of all optimisers change nothing if the loss or the gradient is not finite."""
        finite = torch.isfinite(gradient_norm) & torch.isfinite(torch.as_tensor(loss, device=self.device))
        skipped = (~finite).float()
        for optimiser in optimisers:  # `OneByOne` and torch's fused AdamW read this attribute
            optimiser.found_inf = skipped  # type: ignore[attr-defined] # made for torch's gradient scalers
        self._total += skipped
        self._in_a_row = (self._in_a_row + skipped) * skipped

    def too_many(self, done: int) -> bool:
        """Return whether the limit is reached.

        On an accelerator, the counter is read only every few steps, and the result is False in between.
        """
        every = 1 if self.device.type == "cpu" else min(READ_EVERY, self.limit)
        return done % every == 0 and int(self._in_a_row) >= self.limit

    def state(self) -> Mapping[str, Any]:
        """Return the counters."""
        return {"total": self.total, "in_a_row": int(self._in_a_row)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        self._total.fill_(state["total"])
        self._in_a_row.fill_(state["in_a_row"])
