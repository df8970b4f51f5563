"""However a run ends, the exit code and the tracker report how it ended."""

import json
import signal
import time
from pathlib import Path

import pytest

BASELINE = str(Path(__file__).parents[2] / "configs" / "baseline.toml")
ENDLESS = ("--preset", "ci", "--set", "train.steps=100000")
RAISES_AT_STEP_3 = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, Weights, WeightingStrategy, hookimpl


    @frozen(kw_only=True)
    class Options:
        pass


    class Raises(WeightingStrategy):
        def weigh(self, view):
            if view.step >= 3:
                raise ZeroDivisionError("no weights at step 3")
            return Weights(weight=view.response_BT.float())


    @hookimpl
    def wmtp_weighting_strategies():
        return [
            Component(
                name="late",
                summary="Raises at step 3.",
                options=Options,
                build=lambda options, context: Raises(),
            )
        ]
"""


def wait_for_training(process, storage, *, seconds=200):
    """Wait until the journal holds a metric of stage 2."""
    for _ in range(seconds * 5):
        for journal in (storage / "runs").glob("*/*/*/[!.]*/metrics.jsonl"):
            lines = [
                json.loads(line) for line in journal.read_text().splitlines(keepends=True) if line[-1] == "\n"
            ]
            if any(line.get("stage") == "policy" for line in lines):
                return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)
    pytest.fail("no training step was journalled")


def test_ctrl_c_ends_the_run_as_killed(start, tracked, tmp_path):
    process = start("run", BASELINE, *ENDLESS, cwd=tmp_path)
    wait_for_training(process, tmp_path / "storage")

    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Traceback" not in stderr
    killed = tracked(tmp_path / "storage")
    assert killed.info.status == "KILLED"
    assert killed.info.end_time is not None


def test_a_terminal_that_closes_ends_the_run_as_killed(start, tracked, tmp_path):
    process = start("run", BASELINE, *ENDLESS, cwd=tmp_path)
    wait_for_training(process, tmp_path / "storage")

    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 143, stderr
    assert tracked(tmp_path / "storage").info.status == "KILLED"


def test_sigusr1_at_any_moment_of_a_run_does_not_end_it(start, tracked, tmp_path):
    process = start("run", BASELINE, "--preset", "ci", cwd=tmp_path)
    while not list((tmp_path / "storage" / "runs").glob("*/*/*/[!.]*/run.json")):
        time.sleep(0.05)

    while process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)

    assert process.returncode == 0, process.communicate()[1]
    assert tracked(tmp_path / "storage").info.status == "FINISHED"


def test_a_weighting_that_raises_fails_the_run_and_is_named(wmtp, install, tracked, tmp_path):
    run = wmtp(
        *("run", BASELINE, "--preset", "ci", "--set", "weighting.use=failing.late"),
        cwd=tmp_path,
        env=install("failing", RAISES_AT_STEP_3),
    )

    assert run.returncode == 1
    assert "plugin `failing` (wmtp-failing 0.3.0)" in run.stderr
    assert "ZeroDivisionError: no weights at step 3" in run.stderr
    assert "Traceback" not in run.stderr
    assert tracked(run.storage).info.status == "FAILED"
    assert tracked(run.storage).data.tags["wmtp.plugin.failing"] == "wmtp-failing==0.3.0"


def test_a_recipe_with_faults_starts_nothing(wmtp, tmp_path):
    run = wmtp("run", BASELINE, "--set", "train.stepz=3", cwd=tmp_path)

    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert "did you mean" in run.stderr
    assert not (tmp_path / "storage").exists()
