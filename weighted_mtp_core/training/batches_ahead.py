"""Makes the batch of the next step while an accelerator still computes the current step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import define, field

from weighted_mtp_core.api import Batch


@define(eq=False)
class BatchesAhead:
    """The batches of a stage by step; `prepare` makes a batch before the step that needs it.

    The host only queues the operations of a step. While an accelerator computes the operations, the host is
    free, so `prepare` needs no thread to make the next batch and to queue its copy from pinned memory, see
    `to_device`. A batch depends only on the number of its step, so a resumed run gets the same batches.

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
        """Make the batch of a step ahead, unless the device is a CPU or the stage has no such step.

        Call `prepare` before the host waits for the device.
        """
        if self.device.type != "cpu" and step < self.steps:
            self._ahead = step, self.batch_of(step)
