"""Correct trackers, and mutants for the checks that only trackers must pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import attrs
from weighted_mtp_core.api import RunOutcome, Tracker, WmtpError


class SoundFile(Tracker):
    """Keeps each run as a JSON file."""

    caught_by: ClassVar[set[str]] = set()

    def __init__(self, options: Any, context: Any) -> None:
        self.folder: Path = context.storage / "tracked"
        self.path: Path | None = None

    def _change(self, **changes: Any) -> None:
        if self.path is None:
            raise WmtpError("no run was started")
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = json.loads(self.path.read_text()) if self.path.exists() else {"metrics": {}, "tags": {}}
        for key, value in changes.items():
            if isinstance(value, dict):
                stored[key] |= value
            else:
                stored[key] = value
        self.path.write_text(json.dumps(stored))

    def start(self, run: Any) -> None:
        self.path = self.folder / f"{run.run_id}.json"
        self._change(tags=dict(run.tags))

    def log_metrics(self, points: Any) -> None:
        if points:
            self._change(metrics={f"{point.name}@{point.step}": point.value for point in points})

    def log_artifact(self, path: Any, subdir: str) -> None:
        self._change(**{f"artifact {subdir}/{path.name}": path.read_text()})

    def set_tags(self, tags: Any) -> None:
        self._change(tags=dict(tags))

    def finish(self, outcome: Any, *, time_ms: int | None = None) -> None:
        self._change(outcome=outcome.value)


class KilledIsNoEnd(SoundFile):
    caught_by: ClassVar = {"test_a_run_ends_in_every_outcome"}

    def finish(self, outcome: Any, *, time_ms: int | None = None) -> None:
        if outcome is RunOutcome.KILLED:
            raise ValueError(outcome)
        super().finish(outcome)


class EndsNow(SoundFile):
    caught_by: ClassVar = {"test_a_run_ends_at_a_given_time"}

    def finish(self, outcome: Any) -> None:  # type: ignore[override]
        super().finish(outcome)


class StartsOnce(SoundFile):
    caught_by: ClassVar = {"test_starting_again_reopens_the_run"}

    def start(self, run: Any) -> None:
        if self.path is not None:
            raise RuntimeError("already started")
        super().start(run)


class StartsOnlyNewRuns(SoundFile):
    caught_by: ClassVar = {"test_another_object_reopens_the_run"}

    def start(self, run: Any) -> None:
        if self.path is None and (self.folder / f"{run.run_id}.json").exists():
            raise FileExistsError(run.run_id)
        super().start(run)


class EndsOnce(SoundFile):
    caught_by: ClassVar = {"test_everything_may_be_sent_twice"}
    ended = False

    def start(self, run: Any) -> None:
        super().start(run)
        self.ended = False

    def finish(self, outcome: Any, *, time_ms: int | None = None) -> None:
        if self.ended:
            raise RuntimeError("already ended")
        super().finish(outcome)
        self.ended = True


class NoArtifactAfterTheEnd(EndsOnce):
    caught_by: ClassVar = {"test_artifacts_may_come_after_the_end"}

    def log_artifact(self, path: Any, subdir: str) -> None:
        if self.ended:
            raise RuntimeError("already ended")
        super().log_artifact(path, subdir)

    def finish(self, outcome: Any, *, time_ms: int | None = None) -> None:
        SoundFile.finish(self, outcome)
        self.ended = True


class SpoiltByAnEarlyEnd(SoundFile):
    caught_by: ClassVar = {"test_finishing_before_the_start_breaks_nothing"}

    def start(self, run: Any) -> None:
        if self.path == self.folder:
            raise RuntimeError("already ended")
        super().start(run)

    def finish(self, outcome: Any, *, time_ms: int | None = None) -> None:
        self.path = self.path or self.folder
        super().finish(outcome)


class FewAtATime(SoundFile):
    caught_by: ClassVar = {"test_a_thousand_points_come_at_once"}

    def log_metrics(self, points: Any) -> None:
        if len(points) > 500:
            raise ValueError("too many")
        super().log_metrics(points)


class FiniteOnly(SoundFile):
    caught_by: ClassVar = {"test_a_value_that_is_not_finite_breaks_nothing"}

    def log_metrics(self, points: Any) -> None:
        json.dumps([point.value for point in points], allow_nan=False)
        super().log_metrics(points)


class TagsForEver(SoundFile):
    caught_by: ClassVar = {"test_tags_may_be_overwritten"}

    def set_tags(self, tags: Any) -> None:
        assert self.path is not None
        before = json.loads(self.path.read_text())["tags"]
        if any(before.get(name, value) != value for name, value in tags.items()):
            raise RuntimeError("tags are for ever")
        super().set_tags(tags)


class LooksInManyLines(SoundFile):
    caught_by: ClassVar = {"test_where_is_one_line"}

    def where(self) -> str:
        return "here\nand there"


class MangledNames(SoundFile):
    caught_by: ClassVar = {"test_what_was_sent_is_stored_under_its_name"}

    def log_metrics(self, points: Any) -> None:
        super().log_metrics([attrs.evolve(point, name=point.name.replace("/", "_")) for point in points])
