"""What trackers get of a run, and the kind of component that sends it somewhere: the tracker."""

from __future__ import annotations

import enum
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import field, frozen

from weighted_mtp_core.api.components import Stateful
from weighted_mtp_core.api.data import DatasetVersion


class RunOutcome(enum.Enum):
    """How a run ended, in MLflow's words."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


@frozen(kw_only=True)
class RunInfo:
    """A run as trackers see it.

    Attributes:
        run_id: Unique id, also the name of the run folder.
        name: The recipe's `run.name`.
        experiment: `<experiment_prefix>/<weighting plugin>`, or the recipe's own.
        params: The resolved recipe flattened to dotted keys, and dataset version and checksum.
        tags: The table of tags in docs/commands.md lists them.
        datasets: Recorded as dataset inputs.
        folder: The run folder.
        started_ms: When it began, in milliseconds since 1970.
    """

    run_id: str
    name: str
    experiment: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    datasets: tuple[DatasetVersion, ...]
    folder: Path
    started_ms: int = field(factory=lambda: time.time_ns() // 1_000_000)


@frozen(kw_only=True)
class MetricPoint:
    """One finite value of one metric; `time_ms` is when it was measured, not when it is sent."""

    name: str
    value: float
    step: int
    time_ms: int


class Tracker(Stateful):
    """Sends a run elsewhere. Called from one thread at a time, behind the core's durable journal.

    Every method may raise to say "not delivered": the core tries again later with the same arguments, so
    each must bear being repeated. A `WmtpError` says "never will be": before training it stops the run, later
    the lines are left out, loudly. A tracker that groups runs takes an option `experiment_prefix`.
    """

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """Open the run, or reopen it if `run.run_id` was opened before; repeated as more becomes known."""

    @abstractmethod
    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        """Record up to 1000 points in order."""

    @abstractmethod
    def log_artifact(self, path: Path, subdir: str) -> None:
        """Store a file under `subdir` (may be empty); may come after `finish` if it failed before."""

    @abstractmethod
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or overwrite tags."""

    @abstractmethod
    def finish(self, outcome: RunOutcome, *, time_ms: int | None = None) -> None:
        """Close the run, which ended at `time_ms` (now, if that is None)."""

    def where(self) -> str:
        """Return one line that tells a person how to look at the run."""
        return ""
