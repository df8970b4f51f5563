"""Fixtures of the end-to-end tests: the program, started as a user starts it, and the files that it writes.

A run is a separate process, in most tests started in a new folder with the preset `ci`. A run takes half a
minute, so the tests of a file share runs, and `make test` gives a whole file to one worker.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from attrs import frozen

ISOLATE = Path(__file__).parents[1] / "isolate.py"


@frozen(kw_only=True)
class Run:
    """A command of the program that has ended; `folder` and `journal` are those of its run."""

    returncode: int
    stdout: str
    stderr: str
    storage: Path

    @property
    def folder(self) -> Path:
        (folder,) = (file.parent for file in (self.storage / "runs").rglob("run.json"))
        return folder

    @property
    def journal(self) -> list[dict[str, Any]]:
        """The metric lines of the journal, without the time, which is different in every run."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [{**line, "time": None} for line in lines if line["kind"] == "metrics"]


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment with settings for tests in place of the developer's settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "AWS_", "PYTHON", "PYTEST_"))}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **extra,
    }


@pytest.fixture(scope="session", name="environment")
def environment_fixture() -> Callable[..., dict[str, str]]:
    """The function that returns the environment of a process that a test starts, with further variables."""
    return environment


@pytest.fixture(scope="session")
def start() -> Callable[..., "subprocess.Popen[str]"]:
    """Start `python -m weighted_mtp_core ...` and return the process."""

    def start(
        *arguments: str, cwd: Path, python: str = sys.executable, env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [python, "-m", "weighted_mtp_core", *arguments],
            cwd=cwd,
            env=environment(**(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def wmtp(start: Callable[..., "subprocess.Popen[str]"]) -> Callable[..., Run]:
    """Run `python -m weighted_mtp_core ...` in `cwd` until it ends; its storage is `cwd/storage`."""

    def wmtp(*arguments: str, cwd: Path, **settings: Any) -> Run:
        process = start(*arguments, cwd=cwd, **settings)
        stdout, stderr = process.communicate(timeout=240)
        return Run(
            returncode=process.returncode, stdout=stdout, stderr=stderr, storage=cwd.resolve() / "storage"
        )

    return wmtp


@pytest.fixture(scope="session")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Make an environment with the named packages and those of their extra `dev`; return its interpreter."""

    def isolated(*distributions: str) -> str:
        folder = tmp_path_factory.mktemp("only")
        subprocess.run([sys.executable, ISOLATE, folder, *distributions], check=True)
        return str(folder / "bin" / "python")

    return isolated


OFFLINE = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Build the wheel of the package in a folder; each wheel is built only once."""
    built: dict[Path, Path] = {}

    def wheel(package: Path) -> Path:
        if package not in built:
            folder = tmp_path_factory.mktemp("wheel")
            build = ("wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", folder, package)
            subprocess.run([sys.executable, "-m", "pip", *build], check=True)
            (built[package],) = folder.glob("*.whl")
        return built[package]

    return wheel


@pytest.fixture(scope="session")
def install_wheels(wheel: Callable[[Path], Path]) -> Callable[..., None]:
    """Install the wheels of the packages in some folders for an interpreter."""

    def install_wheels(python: str, *packages: Path) -> None:
        subprocess.run([python, "-m", "pip", "install", *OFFLINE, *map(wheel, packages)], check=True)

    return install_wheels


@pytest.fixture
def install(tmp_path: Path) -> Iterator[Callable[..., dict[str, str]]]:
    """Install a plugin `name` without pip, in a folder; return the variable PYTHONPATH with this folder."""
    elsewhere = tmp_path / "elsewhere"

    def install(name: str, source: str) -> dict[str, str]:
        metadata = elsewhere / f"wmtp_{name}-0.3.0.dist-info"
        metadata.mkdir(parents=True)
        (elsewhere / f"wmtp_{name}.py").write_text(dedent(source))
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: wmtp-{name}\nVersion: 0.3.0\n"
            "Requires-Dist: weighted-mtp-core>=0.1,<0.2\n"
        )
        (metadata / "entry_points.txt").write_text(f"[weighted_mtp_core]\n{name} = wmtp_{name}\n")
        return {"PYTHONPATH": str(elsewhere)}

    return install


@pytest.fixture(scope="session")
def tracked() -> Callable[[Path], Any]:
    """The one MLflow run in the embedded store of a storage root; checks that there is only one."""

    def tracked(storage: Path) -> Any:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
        experiments = [each for each in client.search_experiments() if each.name != "Default"]
        (found,) = client.search_runs([each.experiment_id for each in experiments])
        return found

    return tracked
