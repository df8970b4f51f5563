"""What a process beside the first one records: its words, in a log of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from attrs import define, field

from weighted_mtp_core.api import DatasetVersion
from weighted_mtp_core.redaction import redact, redact_log_records
from weighted_mtp_core.tracking.run_folder import RunFolder
from weighted_mtp_core.tracking.run_log import RunLog


@define(eq=False)
class RankLog:
    """Stands where the first process has a `Recorder`; only `say` leaves something, in `logs/rank-N.log`.

    Args:
        path: The run folder, which the first process holds.
        rank: Which process this is.
    """

    path: Path
    rank: int
    folder: RunFolder = field(init=False)
    _log: RunLog = field(init=False)

    def __attrs_post_init__(self) -> None:
        redact_log_records()
        self.folder = RunFolder(path=self.path)
        self._log = RunLog.open(self.path / "logs" / f"rank-{self.rank}.log")

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Leave it to the first process."""

    def timings(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Leave it to the first process."""

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Leave it to the first process."""

    def tags(self, tags: Mapping[str, str]) -> None:
        """Leave it to the first process."""

    def datasets(self, versions: Sequence[DatasetVersion]) -> None:
        """Leave it to the first process."""

    def artifact(self, path: Path, subdir: str) -> None:
        """Leave it to the first process."""

    def report(self, rows: Sequence[tuple[str, str]]) -> None:
        """Leave it to the first process."""

    def log(self, text: str) -> None:
        """Write it to this process's log."""
        self._log.write(redact(text))

    def where(self) -> list[str]:
        """Leave it to the first process."""
        return []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._log.write_failure(error)
        self._log.close()
