"""A tracker that writes into a list and can simulate outages, and a run folder with a journal to upload."""

import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from rich.console import Console
from weighted_mtp_core.api import RunInfo, Tracker, WmtpError
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.tracking.journal import Journal
from weighted_mtp_core.tracking.outbox import Outbox
from weighted_mtp_core.tracking.recorder import Recorder
from weighted_mtp_core.tracking.run_folder import RunFolder

HOLD = """
    import sys, time
    from pathlib import Path
    from weighted_mtp_core.tracking.run_folder import RunFolder
    folder = RunFolder.open(Path(sys.argv[1]))
    folder.record(name="held")
    print("held", flush=True)
    time.sleep(60)
"""


class Notebook(Tracker):
    """Records its calls in order.

    With `away`, every call raises; with `no_files`, only calls that store a file raise. The call that
    `refuses` names never succeeds. With `answer_lost`, the tracker records the next batch of metrics and then
    raises.
    """

    def __init__(self) -> None:
        self.told = []
        self.away = False
        self.no_files = False
        self.answer_lost = False
        self.refuses = ""
        self.threads = set()

    def _tell(self, what, value):
        self.threads.add(threading.current_thread())
        if self.away:
            raise ConnectionError("nobody there")
        if what == self.refuses:
            raise WmtpError(f"no {what} here")
        self.told.append((what, value))

    def start(self, run):
        self._tell("start", run)

    def log_metrics(self, points):
        self._tell("metrics", [(point.name, point.step, point.value) for point in points])
        if self.answer_lost:
            self.answer_lost = False
            raise TimeoutError("no answer")

    def log_artifact(self, path, subdir):
        if self.no_files:
            raise ConnectionError("no room for files")
        self._tell("artifact", f"{subdir}/{path.name}")

    def set_tags(self, tags):
        self._tell("tags", dict(tags))

    def finish(self, outcome, *, time_ms=None):
        self._tell("finish", outcome)

    def where(self):
        return "look at the notebook"

    def all(self, what):
        return [value for kind, value in self.told if kind == what]

    def points(self):
        return [point for points in self.all("metrics") for point in points]


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A new run folder, locked by this process."""
    folder = RunFolder.create(tmp_path / "runs", experiment="weighted_mtp/flat", name="first")
    yield folder
    folder.close()


@pytest.fixture
def journal(folder: RunFolder) -> Journal:
    """The journal of the folder, with the line that describes the run."""
    journal = Journal(folder.journal)
    journal.append("run", {"run_id": folder.run_id, "name": "first", "experiment": "weighted_mtp/flat"})
    yield journal
    journal.close()


@pytest.fixture
def outbox(folder: RunFolder, journal: Journal, notebook: Notebook) -> Outbox:
    return make_outbox(folder, notebook)


@pytest.fixture
def new_outbox(folder: RunFolder) -> Callable[[Tracker], Outbox]:
    """Create another outbox on the same folder, as the next process does."""
    return lambda tracker: make_outbox(folder, tracker)


def make_outbox(folder, tracker):
    return Outbox(
        tracker=tracker, folder=folder.path, journal=folder.journal, state=folder.delivery("notebook")
    )


@pytest.fixture
def screen() -> io.StringIO:
    """The output of a display."""
    return io.StringIO()


@pytest.fixture
def info(folder: RunFolder) -> RunInfo:
    return RunInfo(
        run_id=folder.run_id,
        name="first",
        experiment="weighted_mtp/flat",
        params={"train.steps": "3"},
        tags={"algo": "flat"},
        datasets=(),
        folder=folder.path,
    )


@pytest.fixture
def open_recorder(folder, info, screen) -> Callable[..., Recorder]:
    """Open a recorder on the folder with trackers by address."""

    def open_recorder(*, close_seconds: float = 10.0, **trackers: Tracker) -> Recorder:
        return Recorder.open(
            folder,
            info,
            trackers=trackers,
            recipe_toml="seed = 1\n",
            display=Display(Console(file=screen, width=200)),
            close_seconds=close_seconds,
        )

    return open_recorder


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    def wait_until(condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.01)

    return wait_until


@pytest.fixture
def holder(folder):
    """Another process that has locked the folder."""
    folder.close()
    process = subprocess.Popen(
        [sys.executable, "-c", dedent(HOLD), folder.path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
