"""Define trackers, which send a run to another system, and the data that trackers receive."""

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
    """How a run ended; the values are also the names of MLflow's run states."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


@frozen(kw_only=True)
class RunInfo:
    """The description of a run that trackers receive.

    Attributes:
        run_id: Unique id of the run, which is also the name of the run folder.
        name: The recipe's `run.name`.
        experiment: `<experiment_prefix>/<weighting plugin>`, or the recipe's `run.experiment` if it is set.
        params: The resolved recipe as dotted keys and, once the data are loaded, the name, version and
            checksum of the data.
        tags: The tags of the run, which docs/commands.md lists.
        datasets: Names, versions and checksums of the data that the run uses; empty until they are loaded.
        folder: The run folder.
        started_ms: Time of the run's start, in milliseconds since 1970.
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
        name: Consists of letters, digits, `_`, `-`, `.`, `:`, `/` and spaces.
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
    """The part of a run that the tracker's store contains.

    Attributes:
        run: Id that the store has given the run; empty if the run was deleted there.
        last_step: For each metric, the last step that the store contains.
    """

    run: str
    last_step: Mapping[str, int]


class Tracker(Stateful):
    """Sends a run to another system.

    Core calls the methods of a tracker from one thread at a time, except `where`, which core may call while
    another method is running.

    Core writes all data to a journal on disk first. If a method raises an exception, core sends the same data
    again later, possibly together with newer data or in another process, so every method must tolerate data
    that it has received before. Raise a `WmtpError` if a later call would fail too: before training, this
    error stops the run; during training, core skips the data and logs a message. A tracker that groups runs
    by experiment should have the option `experiment_prefix`.
    """

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """Open the run, or reopen it if the store already contains `run.run_id`.

        Core calls `start` again when the run resumes, when the params or the data of the run change, and when
        the store has lost the run.
        """

    @abstractmethod
    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        """Record up to 1000 metric points, in the given order."""

    @abstractmethod
    def log_artifact(self, path: Path, subdir: str) -> None:
        """Store a file in the folder `subdir` of the run's files; an empty `subdir` means the top folder.

        If a call fails, core may call `log_artifact` again after `finish`.
        """

    @abstractmethod
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; existing tags with the same names are overwritten."""

    @abstractmethod
    def finish(self, outcome: RunOutcome, *, time_ms: int | None = None) -> None:
        """Close the run.

        Args:
            outcome: How the run ended.
            time_ms: Time at which the run ended, in milliseconds since 1970; None means now.
        """

    def store(self) -> str:
        """Return the address of the store without secrets, or an empty string.

        This method must not contact the store, and core may call it before `start`. If the address has
        changed since the last delivery, core sends everything that the store at the new address has not
        received.
        """
        return ""

    def kept(self) -> KeptRun | None:
        """Return the part of the run that the store contains, or None if the tracker cannot determine it.

        Core calls `kept` after `start` and before it sends metrics or the end of the run. If the store has
        another run, or does not contain all steps that were sent, core sends the whole run again; the tracker
        must then leave out the points that the store already has.
        """
        return None

    def where(self) -> str:
        """Return one line that tells the user where to find the run, such as a URL; the line may be empty."""
        return ""
