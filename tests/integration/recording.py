"""Runs for tests, their output, and what MLflow's own client reads back."""

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from rich.console import Console
from weighted_mtp_core.api import BuildContext, RunInfo
from weighted_mtp_core.builtin.mlflow import MlflowOptions, build_mlflow
from weighted_mtp_core.plan import make_plan
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.tracking.journal import read_journal
from weighted_mtp_core.tracking.outbox import to_points
from weighted_mtp_core.tracking.recorder import Recorder
from weighted_mtp_core.tracking.run_folder import RunFolder

RECIPE = Path(__file__).parents[2] / "configs" / "baseline.toml"
TRACKER = "0-core.mlflow"


def open_recorder(
    cwd: Path, *, close_seconds: float = 60.0, params: dict | None = None, **options: object
) -> Recorder:
    """Begin a run below a folder, with the tracker `core.mlflow` and these options and limits."""
    tracker = build_mlflow(MlflowOptions(**options), BuildContext(seed=0, storage=cwd / "storage"))
    experiment = f"{options.get('experiment_prefix', 'weighted_mtp')}/{cwd.name}"
    folder = RunFolder.create(cwd / "runs", experiment=experiment, name="run")
    info = RunInfo(
        run_id=folder.run_id,
        name="run",
        experiment=experiment,
        params=params or {"train.steps": "3"},
        tags={"algo": "flat"},
        datasets=(),
        folder=folder.path,
    )
    return Recorder.open(
        folder,
        info,
        trackers={TRACKER: tracker},
        recipe_toml=make_plan(RECIPE).recipe_toml,
        display=Display(Console(file=io.StringIO(), width=300)),
        close_seconds=close_seconds,
    )


def shown(record: Recorder) -> str:
    """Return the output of a run's display."""
    return str(record.display.console.file.getvalue())


def wait_until(condition: Callable[[], bool], *, seconds: float = 30.0, said: str = "") -> None:
    """Wait for a condition; a server that is being stopped or started may fail to answer."""
    end = time.monotonic() + seconds
    while not _holds(condition):
        assert time.monotonic() < end, f"it did not happen in time {said}"
        time.sleep(0.05)


def _holds(condition: Callable[[], bool]) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return condition()
    except MlflowException:
        return False


def wait_for_words(record: Recorder, words: str, *, seconds: float = 30.0) -> None:
    """Wait until the display of a run shows some words."""
    wait_until(lambda: words in shown(record), seconds=seconds, said=f"({words})")


class Training:
    """A thread that records five metrics per step, and keeps the longest time of a recording, in seconds."""

    def __init__(self, record: Recorder, *, step_seconds: float = 0.05) -> None:
        self.record = record
        self.step = 0
        self.slowest = 0.0
        self.step_seconds = step_seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self.step_seconds):
            self.step += 1
            began = time.perf_counter()
            self.record.metrics("policy", self.step, {f"m{i}": self.step / (i + 1) for i in range(5)})
            self.slowest = max(self.slowest, time.perf_counter() - began)


class Stored:
    """A run as MLflow's own client reads it, from the server or from the given store."""

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(uri)
        self.folder = folder
        experiments = [each.experiment_id for each in self.client.search_experiments()]
        (self.run,) = self.client.search_runs(
            experiments, filter_string=f"tags.`wmtp.run_id` = '{folder.name}'"
        )

    @property
    def status(self) -> str:
        return self.run.info.status

    def points(self) -> list[tuple[str, int, float, int]]:
        """Every point, as often as it is stored."""
        return sorted(
            (name, point.step, point.value, point.timestamp)
            for name in self.run.data.metrics
            for point in self.client.get_metric_history(self.run.info.run_id, name)
        )

    def file(self, path: str) -> bytes:
        return Path(self.client.download_artifacts(self.run.info.run_id, path)).read_bytes()

    def journalled(self) -> list[tuple[str, int, float, int]]:
        """Every finite point of the journal, once."""
        return sorted(
            (point.name, point.step, point.value, point.time_ms)
            for entry in read_journal(self.folder / "metrics.jsonl")
            if entry.kind in {"metrics", "timings"}
            for point in to_points(entry)
        )
