"""The tracker of a run that is recorded in its run folder only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from weighted_mtp_core.api import MetricPoint, RunInfo, RunOutcome, Tracker


class NoopTracker(Tracker):
    """Accepts everything and keeps nothing: `enabled = false` selects it."""

    def start(self, run: RunInfo) -> None:
        """Do nothing."""

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        """Do nothing."""

    def log_artifact(self, path: Path, subdir: str) -> None:
        """Do nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def finish(self, outcome: RunOutcome, *, time_ms: int | None = None) -> None:
        """Do nothing."""
