"""Steps whose loss or gradient is not finite: skipped on the device, counted, and stopped at some point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

_LOOK_EVERY = 10  # steps between two looks at a counter on an accelerator: each one waits for the device


@define(kw_only=True, eq=False)
class NonfiniteSteps:
    """Counts skipped steps; the counters live on the device, so that counting never waits for it.

    Attributes:
        limit: So many in a row are too many.
        device: Where the training computes.
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
        """How many steps were skipped."""
        return int(self._total)

    def skip_if_not_finite(
        self, optimiser: torch.optim.AdamW, loss: Tensor | float, gradient_norm: Tensor
    ) -> None:
        """Make the optimiser's next step change nothing if the loss or the gradient is not finite."""
        finite = torch.isfinite(gradient_norm) & torch.isfinite(torch.as_tensor(loss, device=self.device))
        bad = (~finite).float()
        # The fused kernel reads this the way it does for a gradient scaler.
        optimiser.found_inf = bad  # type: ignore[attr-defined]
        self._total += bad
        self._in_a_row = (self._in_a_row + bad) * bad

    def too_many(self, done: int) -> bool:
        """Say whether the limit is reached; an accelerator is asked now and then only."""
        every = 1 if self.device.type == "cpu" else min(_LOOK_EVERY, self.limit)
        return done % every == 0 and int(self._in_a_row) >= self.limit

    def state(self) -> Mapping[str, Any]:
        """Return the counters."""
        return {"total": self.total, "in_a_row": int(self._in_a_row)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore `state`'s result."""
        self._total.fill_(state["total"])
        self._in_a_row.fill_(state["in_a_row"])
