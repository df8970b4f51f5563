"""What a forecast of memory is made of: the target of a run, the phases of a run and the parts of memory."""

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
    """What a run is planned for.

    Attributes:
        device: `cpu`, `cuda` or another type of device.
        dtype: The dtype of forward passes.
        memory: All memory of a CUDA device in bytes; None for other devices.
        processes: Number of processes that train together.
        local: Number of these processes on one machine.
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
        name: The phase.
        parts: Bytes of one process at that moment, by part; the keys are in `PARTS`.
    """

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of one process."""
        return sum(self.parts.values())


@frozen(kw_only=True)
class Phases:
    """The phases of a run.

    Attributes:
        found: The phases in order.
        parameters: Number of parameters of the policy.
        model: Bytes of these parameters.
        held: Bytes of these parameters that one process holds.
        saved: Bytes of the parameters that a file of the whole policy holds.
        optimiser: Bytes of the policy's optimiser that one process holds.
        critic: Bytes of the critic.
        rows: Rows and tokens of a micro-batch of the policy.
        uncounted: What could not be run without values, with the reasons.
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
