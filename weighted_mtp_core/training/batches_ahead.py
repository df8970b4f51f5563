"""Makes the batch of the next step while an accelerator still computes the current step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import define, field

from weighted_mtp_core.api import Batch


@define(eq=False)
class BatchesAhead:
    """The batches of a stage, requested in any order; on a CPU nothing is made ahead.

    The host only queues the work of a step and is soon done, so it needs no thread to be ahead: `prepare`
    makes the next batch and queues its copy from pinned memory, see `to_device`. Batches are a function of
    the step, so a resumed run gets the same ones.

    Attributes:
        batch_of: Returns the batch of a step.
        steps: Number of steps of the stage.
        device: The device that computes.
    """

    batch_of: Callable[[int], Batch]
    steps: int
    device: torch.device
    _ahead: tuple[int, Batch] | None = field(init=False, default=None)

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step."""
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] == step else self.batch_of(step)

    def prepare(self, step: int) -> None:
        """Make the batch of a step if the stage has it; call this before the host waits for the device."""
        if self.device.type != "cpu" and step < self.steps:
            self._ahead = step, self.batch_of(step)
