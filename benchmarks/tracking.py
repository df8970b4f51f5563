"""Cost of tracking for the training thread: 50 metrics per step, with each kind of store and a server down.

    python benchmarks/tracking.py

The benchmark starts the servers of tests/integration on the loopback interface. The exit code is 1 if a limit
is missed. Recording one step may take 200 us (median) and 2 ms (99th percentile). While the server is down, a
step may take 1.05 times the time of an untracked step; both kinds of steps run in this process, in turns.
Shared machines are noisy, so compare the times with the load and with the times without tracking, which are
the lower bound on this machine.
"""

import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))
import stack as servers
from weighted_mtp_core.api import BuildContext, RunInfo
from weighted_mtp_core.builtin.mlflow import MlflowOptions, build_mlflow
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.tracking.recorder import Recorder
from weighted_mtp_core.tracking.run_folder import RunFolder

MEDIAN_US, P99_US, SLOWDOWN = 200.0, 2000.0, 1.05
METRICS = 50
STEPS = 1000
ROUNDS, ROUND_STEPS = 10, 100


def open_run(folder: Path, options: Mapping[str, Any] | None) -> Recorder:
    """Open a run that `core.mlflow` tracks, or a run without a tracker if `options` is None."""
    run = RunFolder.create(folder / "runs", experiment="benchmark/tracking", name="run")
    info = RunInfo(
        run_id=run.run_id,
        name="run",
        experiment="benchmark/tracking",
        params={},
        tags={},
        datasets=(),
        folder=run.path,
    )
    trackers = {}
    if options is not None:
        trackers["0-core.mlflow"] = build_mlflow(
            MlflowOptions(**options), BuildContext(seed=0, storage=folder)
        )
    return Recorder.open(
        run,
        info,
        trackers=trackers,
        recipe_toml="seed = 1\n",
        display=Display(Console(file=io.StringIO())),
        close_seconds=0.0,
    )


def make_step() -> Callable[[], None]:
    """Return a function that computes for about 20 ms on one thread, in place of a training step."""
    torch.set_num_threads(1)
    matrix = torch.randn(512, 512)

    def work() -> None:
        product = matrix
        for _ in range(4):
            product = torch.tanh(product @ matrix)

    return work


def measure_recording(record: Recorder, work: Callable[[], None]) -> list[float]:
    """Return for each of many steps how many microseconds recording takes."""
    values = {f"metric_{i}": i / 7 for i in range(METRICS)}
    took = []
    for step in range(1, STEPS + 1):
        work()
        began = time.perf_counter()
        record.metrics("policy", step, values)
        took.append((time.perf_counter() - began) * 1e6)
    return took


def measure_steps(record: Recorder, work: Callable[[], None]) -> float:
    """Return the mean seconds of a recorded step."""
    values = {f"metric_{i}": i / 7 for i in range(METRICS)}
    began = time.perf_counter()
    for step in range(1, ROUND_STEPS + 1):
        work()
        record.metrics("policy", step, values)
    return (time.perf_counter() - began) / ROUND_STEPS


def main() -> int:
    """Measure and print; return the exit code."""
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {METRICS} metrics a step")
    work, missed = make_step(), False
    stack = servers.Stack()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        try:
            stack.up()
            stack.configure(patch)
            patch.setenv("PGPASSWORD", stack.database_password)
            s3 = f"s3://{servers.BUCKET}/benchmark"
            stores: dict[str, dict[str, str] | None] = {
                "untracked, journal": None,
                "server, its files": {},
                "server, files to S3": {"artifact_root": s3, "experiment_prefix": "direct"},
                "postgresql": {"tracking_uri": stack.database_uri, "artifact_root": s3},
                "sqlite": {"tracking_uri": f"sqlite:///{folder}/mlflow.db"},
                "file": {"tracking_uri": f"file://{folder}/mlflow"},
            }
            for store, options in stores.items():
                with open_run(folder, options) as record:
                    took = measure_recording(record, work)
                median, p99 = statistics.median(took), statistics.quantiles(took, n=100)[98]
                missed |= options is not None and (median > MEDIAN_US or p99 > P99_US)
                print(f"{store:20} median {median:6.0f} us   p99 {p99:6.0f} us   worst {max(took):6.0f} us")
            ratio = slowdown_without_server(stack, folder, work)
            missed |= ratio > SLOWDOWN
            print(f"step with the server down over step untracked: {ratio:.3f}")
        finally:
            stack.down()
    print("MISSED a limit" if missed else "within all limits")
    return int(missed)


def slowdown_without_server(stack: servers.Stack, folder: Path, work: Callable[[], None]) -> float:
    """Kill the server, then measure tracked and untracked steps.

    Returns:
        The time of a tracked step over the time of an untracked step, as a median over rounds.
    """
    with open_run(folder, {}) as record:
        measure_steps(record, work)
        stack.mlflow.kill()
    ratios = []
    cases: tuple[Mapping[str, Any] | None, ...] = ({}, None)
    for _ in range(ROUNDS):
        seconds = []
        for options in cases:
            with open_run(folder, options) as record:
                seconds.append(measure_steps(record, work))
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


if __name__ == "__main__":
    sys.exit(main())
