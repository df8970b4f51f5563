"""What the loop trains: the interface that `critic_learner.py` and `policy_learner.py` implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen
from torch import Tensor, nn

from weighted_mtp_core.api import Batch

Scalars = Mapping[str, Tensor | float]


@frozen(kw_only=True, eq=False)
class StepResult:
    """The result of one training step.

    Attributes:
        loss: Scalar, on the device.
        metrics: Computes the other scalars of the step; called only for a step that is logged.
    """

    loss: Tensor | float
    metrics: Callable[[], Scalars]


@frozen(kw_only=True)
class Validation:
    """One validation: scalars to log, and the score (higher is better) that selects the best checkpoint."""

    metrics: Mapping[str, float]
    score: float


class Learner(ABC):
    """A model with its loss and its validation.

    Attributes:
        stage: `critic` or `policy`, the stage's name in the journal.
        loss_name: The metric name of the loss, which the progress display shows.
        best: The file or folder that `save_best` writes.
    """

    stage: str
    loss_name: str
    best: Path

    @abstractmethod
    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters; those that require a gradient are optimised."""

    @abstractmethod
    def learn(self, batch: Batch, *, step: int) -> StepResult:
        """Accumulate the gradient of one global batch; `step` is 0-based."""

    @abstractmethod
    def validate(self, *, step: int) -> Validation:
        """Measure on the validation split, without changing any state."""

    @abstractmethod
    def state_dict(self) -> Mapping[str, Any]:
        """Return the tensors and plain values from which a resumed training continues."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`."""

    @abstractmethod
    def save_best(self) -> None:
        """Write the present state as the best one."""

    @abstractmethod
    def load_best(self) -> None:
        """Restore the state that `save_best` wrote last."""
