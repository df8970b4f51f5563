"""The record of a process other than rank 0; it consists only of the log `logs/rank-<N>.log`."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from attrs import define, field

from weighted_mtp_core.redaction import redact, redact_log_records
from weighted_mtp_core.tracking.run_folder import RunFolder
from weighted_mtp_core.tracking.run_log import RunLog


@define(eq=False)
class RankLog:
    """Has the methods of `Recorder` that stages call: logs messages and failures, and ignores the rest.

    Args:
        path: The run folder, which is locked by rank 0.
        rank: Rank of this process.
    """

    path: Path
    rank: int
    folder: RunFolder = field(init=False)
    _log: RunLog = field(init=False)

    def __attrs_post_init__(self) -> None:
        redact_log_records()
        self.folder = RunFolder(path=self.path)
        self._log = RunLog.open(self.path / "logs" / f"rank-{self.rank}.log")

    def _skip(self, *args: object) -> None:
        """Do nothing, because rank 0 records the run."""

    metrics = timings = progress = tags = params = datasets = artifact = report = _skip

    def log(self, text: str) -> None:
        """Write a line to the log of this process."""
        self._log.write(redact(text))

    def where(self) -> list[str]:
        """Return no lines, because rank 0 shows where to find the run."""
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
