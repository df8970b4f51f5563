"""Define the checks that every tracker must pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest

from weighted_mtp_core.api import DatasetVersion, MetricPoint, RunInfo, RunOutcome, Tracker
from weighted_mtp_core.plugins.loading import Kind
from weighted_mtp_core.testing.component import ComponentSuite

Build = Callable[[], Tracker]
Stored = Mapping[str, list[tuple[int, float]]]


def point(name: str, value: float, *, step: int = 1) -> MetricPoint:
    """Return a metric point at a time that depends only on `step`."""
    return MetricPoint(name=name, value=value, step=step, time_ms=1_700_000_000_000 + step)


class TrackerSuite(ComponentSuite):
    """Checks that a tracker tolerates repeated calls, calls after the end of a run, and unusual values.

    Override the fixture `read_back` to also check that the store contains the metrics that were sent.
    """

    kind: ClassVar[Kind] = Kind.TRACKER

    @pytest.fixture
    def read_back(self) -> Callable[[RunInfo], Stored] | None:
        """A function that reads the points (step, value) of each metric of a run from the store.

        By default, the fixture is None, and the check of the stored points is skipped.
        """
        return None

    @pytest.fixture
    def run(self, tmp_path: Path) -> RunInfo:
        """The description of a run, in the form in which core sends it to trackers."""
        folder = tmp_path / "runs" / "run-1"
        folder.mkdir(parents=True)
        return RunInfo(
            run_id="0123456789abcdef0123456789abcdef",
            name="first_run",
            experiment="weighted_mtp/conformance",
            params={"train.steps": "10", "data.sha256": "0" * 64, "model.base": "micro"},
            tags={"algo": "conformance", "wmtp.data": "my_plugin.numbers", "team": "a: b/c d"},
            datasets=(DatasetVersion(name="numbers", version="1", sha256="0" * 64),),
            folder=folder,
            started_ms=1_700_000_000_000,
        )

    @pytest.fixture
    def artifact(self, run: RunInfo) -> Path:
        """A file in the run folder."""
        path = run.folder / "training.log"
        path.write_text("step 1\n")
        return path

    @pytest.fixture
    def started(self, build: Build, run: RunInfo) -> Tracker:
        """A tracker for which `start` was called."""
        tracker = build()
        tracker.start(run)
        return tracker

    @pytest.mark.parametrize("outcome", RunOutcome)
    def test_a_run_ends_in_every_outcome(self, started: Tracker, outcome: RunOutcome) -> None:
        """A run may end as FINISHED, FAILED or KILLED."""
        started.finish(outcome)

    def test_a_run_ends_at_a_given_time(self, started: Tracker) -> None:
        """`finish` must accept a time in the past, because core may report the end of a run much later."""
        started.finish(RunOutcome.FINISHED, time_ms=1_700_000_060_000)

    def test_starting_again_reopens_the_run(self, started: Tracker, run: RunInfo) -> None:
        """Core calls `start` again if params or data of a run change, and after every resume."""
        started.start(attrs.evolve(run, tags={**run.tags, "model_version": "micro-1"}))
        started.log_metrics([point("loss", 1.0)])
        started.finish(RunOutcome.FINISHED)
        started.start(run)
        started.log_metrics([point("loss", 0.5, step=2)])
        started.finish(RunOutcome.FINISHED)

    def test_another_object_reopens_the_run(self, build: Build, started: Tracker, run: RunInfo) -> None:
        """A new tracker object must be able to reopen a run, because a run may resume in another process."""
        started.log_metrics([point("loss", 1.0)])
        again = build()
        again.start(run)
        again.log_metrics([point("loss", 0.5, step=2)])
        again.finish(RunOutcome.FINISHED)

    def test_everything_may_be_sent_twice(self, started: Tracker, artifact: Path) -> None:
        """All calls may be repeated, because core sends data again if their delivery was not confirmed."""
        for _ in range(2):
            started.log_metrics([point("loss", 1.0)])
            started.set_tags({"state": "going on"})
            started.log_artifact(artifact, "logs")
        for _ in range(2):
            started.finish(RunOutcome.FINISHED)

    def test_artifacts_may_come_after_the_end(self, started: Tracker, artifact: Path) -> None:
        """Core may retry a failed upload after `finish`, and the folder `subdir` may be empty."""
        started.finish(RunOutcome.FINISHED)
        started.log_artifact(artifact, "")
        started.log_artifact(artifact, "logs")

    def test_finishing_before_the_start_breaks_nothing(self, build: Build, run: RunInfo) -> None:
        """A premature `finish` may raise any exception, but must not prevent the run from starting."""
        tracker = build()
        with contextlib.suppress(Exception):
            tracker.finish(RunOutcome.FAILED)
        tracker.start(run)
        tracker.log_metrics([point("loss", 1.0)])
        tracker.finish(RunOutcome.FINISHED)

    def test_a_thousand_points_come_at_once(self, started: Tracker) -> None:
        """`log_metrics` must accept any number of points from zero to a thousand in one call."""
        started.log_metrics([point("loss", float(i), step=i) for i in range(1000)])
        started.log_metrics([])

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_value_that_is_not_finite_breaks_nothing(self, started: Tracker, value: float) -> None:
        """Core sends only finite values, but a value that is not finite must not make a call fail."""
        started.log_metrics([point("loss", value), point("accuracy", 0.5)])
        started.finish(RunOutcome.FAILED)

    def test_tags_may_be_overwritten(self, started: Tracker) -> None:
        """`set_tags` must overwrite existing tags, because tags of a run can change later."""
        started.set_tags({"state": "one"})
        started.set_tags({"state": "two", "note": ""})

    def test_where_is_one_line(self, started: Tracker) -> None:
        """The result of `where` must be one line, which core prints at the end of a run."""
        where: Any = started.where()

        assert isinstance(where, str)
        assert "\n" not in where

    def test_what_was_sent_is_stored_under_its_name(
        self, started: Tracker, run: RunInfo, read_back: Callable[[RunInfo], Stored] | None
    ) -> None:
        """Names of metrics may contain letters, digits, `_`, `-`, `.`, `:`, `/` and spaces."""
        if read_back is None:
            pytest.skip("override the fixture `read_back` to run this check")
        sent = {"value_loss": 0.25, "head.1/ce": 1.5, "a b-c:d": -3.0}
        started.log_metrics([point(name, value, step=7) for name, value in sent.items()])
        started.finish(RunOutcome.FINISHED)

        assert {name: read_back(run)[name] for name in sent} == {n: [(7, v)] for n, v in sent.items()}
