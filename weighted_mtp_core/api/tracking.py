"""Trackers, the components that send a run to another system, and the data that they receive."""

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
    """How a run ended; the values are the names of MLflow's run states."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


@frozen(kw_only=True)
class RunInfo:
    """The description of a run that trackers receive.

    Attributes:
        run_id: Unique id, also the name of the run folder.
        name: The recipe's `run.name`.
        experiment: `<experiment_prefix>/<weighting plugin>`, or the recipe's `run.experiment`.
        params: The resolved recipe as dotted keys, and the version and checksum of the data.
        tags: The tags that docs/commands.md lists.
        datasets: The data that the run uses.
        folder: The run folder.
        started_ms: Time of the start, in milliseconds since 1970.
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
    """One value of one metric.

    Attributes:
        name: Consists of letters, digits, `_`, `-`, `.`, `/` and spaces.
        value: The value, which must be finite.
        step: Step at which the value was measured.
        time_ms: Time of the measurement, in milliseconds since 1970; core may send the point much later.
    """

    name: str
    value: float
    step: int
    time_ms: int


@frozen(kw_only=True)
class KeptRun:
    """What the tracker's store contains of a run.

    Attributes:
        run: Id that the store has given the run.
        last_step: The last step of each metric in the store.
    """

    run: str
    last_step: Mapping[str, int]


class Tracker(Stateful):
    """Sends a run to another system. Its methods are called from one thread at a time.

    Core writes all data to a journal on disk first. If a method raises, core calls it again later with the
    same arguments, possibly in another process, so every method must tolerate repeated calls. Raise a
    `WmtpError` if a later call would fail too: before training this error stops the run; during training core
    skips the data and logs a warning. A tracker that groups runs should have the option `experiment_prefix`.
    """

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """Open the run, or reopen it if `run.run_id` exists. Core calls this again for new tags or data."""

    @abstractmethod
    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        """Record up to 1000 points in the given order."""

    @abstractmethod
    def log_artifact(self, path: Path, subdir: str) -> None:
        """Store a file in the run's folder `subdir`, which may be empty. A retry may come after `finish`."""

    @abstractmethod
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; existing tags with the same names are overwritten."""

    @abstractmethod
    def finish(self, outcome: RunOutcome, *, time_ms: int | None = None) -> None:
        """Close the run, which ended at `time_ms` (milliseconds since 1970) or, if that is None, now."""

    def store(self) -> str:
        """Return the address of the store without secrets, or an empty string. Must not contact the store.

        If the address has changed since the last delivery, core sends the whole run again. Core may call this
        method before `start`.
        """
        return ""

    def kept(self) -> KeptRun | None:
        """Return what the store contains of the run, or None if the tracker cannot determine it.

        Core calls this after `start`. If the store has another run, or lacks steps that were sent, core sends
        the whole run again; the tracker must then leave out the points that the store already has.
        """
        return None

    def where(self) -> str:
        """Return one line for the user about where to find the run, such as a URL; may be empty."""
        return ""
