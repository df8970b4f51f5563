"""Defines the target of a memory forecast, the phases of a run, and the names of the parts of memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import frozen

from weighted_mtp_core.memory.live_tensors import BACKWARD, CAST, GRADIENTS, LOGITS

PARAMETERS, OPTIMISER, CRITIC = "parameters", "optimiser", "critic"
TRUNK, OTHER, CACHE = "activations of the trunk", "other activations", "key-value cache"
GATHERED, SENT = "gathered matrices", "gradients being sent"
PARTS = (
    PARAMETERS,
    CAST,
    GRADIENTS,
    OPTIMISER,
    CRITIC,
    TRUNK,
    OTHER,
    LOGITS,
    BACKWARD,
    CACHE,
    GATHERED,
    SENT,
)
TRAINING, VALIDATION = "policy training", "validation"
COPIES = "copies for files"


@frozen(kw_only=True)
class Target:
    """The device and the processes of a run whose memory is forecast.

    Attributes:
        device: `cpu`, `cuda` or another type of device.
        dtype: The dtype of forward passes.
        memory: Total memory of a CUDA device in bytes; None for other devices.
        processes: Number of processes that train together.
        local: Number of processes on one machine.
    """

    device: str
    dtype: torch.dtype
    memory: int | None = None
    processes: int = 1
    local: int = 1


@frozen(kw_only=True)
class Phase:
    """The largest use of memory in one phase of a run.

    Attributes:
        name: Name of the phase.
        parts: Bytes at the moment of the largest use, by part; the keys are in `PARTS`, or are `COPIES`.
    """

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Sum of the bytes of all parts."""
        return sum(self.parts.values())


@frozen(kw_only=True)
class Phases:
    """The simulated phases of a run, and the sizes of its models.

    Attributes:
        found: The phases in order.
        parameters: Number of parameters of the policy.
        model: Bytes of the policy's parameters.
        held: Bytes of the policy's parameters that one process holds.
        saved: Bytes of the parameters in a file of the policy.
        optimiser: Bytes of the state of the policy's optimisers that one process holds.
        critic: Bytes of the critic.
        rows: Number of rows, and of tokens per row, of the largest micro-batch of stage 2; both are 0 if
            stage 2 was not simulated.
        uncounted: The phases and components that could not be simulated, with the reasons.
    """

    found: tuple[Phase, ...]
    parameters: int
    model: int
    held: int
    saved: int
    optimiser: int
    critic: int
    rows: tuple[int, int]
    uncounted: tuple[str, ...]
