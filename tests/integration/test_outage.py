"""The server is down for a minute. Later, it has all data of runs that went on, ended or died meanwhile."""

import json
import signal
import time
from pathlib import Path

import pytest
from attrs import define, field
from recording import Stored, Training, open_recorder, shown, wait_until

pytestmark = pytest.mark.slow

CLOSE_SECONDS = 3
CI = (
    *("run", Path(__file__).parents[2] / "configs" / "baseline.toml", "--preset", "ci"),
    *("--set", f'tracker=[{{use="core.mlflow",close_seconds={CLOSE_SECONDS}}}]'),
    *("--set", "checkpoint.every=1", "--set", "train.log_every=1", "--set", "evaluate.problems=1"),
)
STEPS = {"ends": 100, "stopped": 100_000, "dies": 100_000}


@define(kw_only=True)
class Outage:
    """The results by the name of the run, and the output of `track status`."""

    folders: dict[str, Path]
    codes: dict[str, int] = field(factory=dict)
    stdout: dict[str, str] = field(factory=dict)
    closing_s: dict[str, float] = field(factory=dict)
    status: str = ""
    synced: dict[str, Stored] = field(factory=dict)


def steps(folder):
    """The steps of stage 2 in a run's journal."""
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [each["step"] for each in entries if each["kind"] == "metrics" and each["stage"] == "policy"]


def run_folders(cwd):
    """The run folders by the name of the run, without incomplete ones, whose names begin with a dot."""
    files = (cwd / "storage" / "runs").glob("*/*/*/[!.]*/run.json")
    return {file.parents[1].name: file.parent for file in files}


@pytest.fixture(scope="module")
def outage(stack, wmtp, tmp_path_factory):
    """Three runs of the program and one of this process during one outage; then `track sync` of the three."""
    cwd = tmp_path_factory.mktemp("outage")
    processes = {
        name: wmtp(*CI, "--set", f"train.steps={count}", "--run-name", name, cwd=cwd)
        for name, count in STEPS.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        stack.configure(patch)
        with open_recorder(tmp_path_factory.mktemp("goes_on")) as record, Training(record) as loop:
            wait_until(lambda: len(run_folders(cwd)) == len(STEPS), seconds=60)
            found = Outage(folders=run_folders(cwd))
            wait_until(lambda: all(map(steps, found.folders.values())), seconds=120)
            stack.mlflow.kill()
            down = time.monotonic()
            stop_and_wait(processes, found)
            time.sleep(max(0.0, down + 60 - time.monotonic()))
            found.status, _ = wmtp("track", "status", cwd=cwd).communicate(timeout=60)
            stack.mlflow.start()
            back, missed = time.monotonic(), loop.step
            wait_until(lambda: Stored(record.folder.path).run.data.metrics["m0"] >= missed, seconds=60)
            found.closing_s["catches up"] = time.monotonic() - back
        syncs = [wmtp("track", "sync", folder, cwd=cwd) for folder in found.folders.values()]
        assert [sync.wait(timeout=100) for sync in syncs] == [0, 0, 0]
        found.synced = {name: Stored(folder) for name, folder in found.folders.items()}
    return found, record, loop


def stop_and_wait(processes, found):
    """Stop one run, kill another, let the third one end."""
    reached = {name: steps(folder)[-1] for name, folder in found.folders.items()}
    wait_until(lambda: all(steps(found.folders[name])[-1] > reached[name] + 2 for name in reached))
    processes["stopped"].send_signal(signal.SIGTERM)
    processes["dies"].send_signal(signal.SIGKILL)
    for name in ("stopped", "ends", "dies"):
        found.stdout[name], _ = processes[name].communicate(timeout=100)
        found.codes[name] = processes[name].returncode
        ended_ms = json.loads((found.folders[name] / "run.json").read_text()).get("ended_ms", 0)
        found.closing_s[name] = time.time() - ended_ms / 1000


def test_a_run_that_goes_on_loses_nothing_and_catches_up_in_ten_seconds(outage):
    found, record, loop = outage
    run = Stored(record.folder.path)

    assert found.closing_s["catches up"] < 10
    assert loop.slowest < 1  # waiting for a server would take as long as its timeout
    assert run.status == "FINISHED"
    assert run.points() == run.journalled()
    assert shown(record).count("`core.mlflow` is unavailable") == 1
    assert shown(record).count("`core.mlflow` is available again") == 1


def test_points_arrive_in_order(outage):
    _, record, loop = outage
    run = Stored(record.folder.path)

    history = run.client.get_metric_history(run.run.info.run_id, "m0")

    assert [point.step for point in history] == list(range(1, loop.step + 1))


@pytest.mark.parametrize(("name", "code"), [("ends", 0), ("stopped", 143)])
def test_a_run_that_ends_without_the_server_has_its_own_exit_code_and_says_what_is_pending(
    outage, name, code
):
    found, *_ = outage

    assert found.codes[name] == code
    assert found.closing_s[name] < 10  # the limit plus the exit of Python on a busy machine
    assert "`core.mlflow` has not received " in found.stdout[name]
    assert f"track sync {found.folders[name]}" in found.stdout[name]


def test_track_status_shows_what_is_pending(outage):
    found, *_ = outage
    lines = {name: line for name in STEPS for line in found.status.splitlines() if f"/{name}/" in line}

    assert {name: line.split()[1] for name, line in lines.items()} == {
        "ends": "FINISHED",
        "stopped": "KILLED",
        "dies": "DIED",
    }
    assert all("core.mlflow: " in line for line in lines.values())


@pytest.mark.parametrize(
    ("name", "status"), [("ends", "FINISHED"), ("stopped", "KILLED"), ("dies", "KILLED")]
)
def test_track_sync_restores_rows_and_status(outage, name, status):
    found, *_ = outage
    run = found.synced[name]

    assert run.status == status
    assert run.run.info.end_time is not None
    assert run.file("logs/training.log")
    if name != "dies":
        assert run.points() == run.journalled()


def test_a_run_that_was_killed_and_synced_goes_on_as_the_same_run_with_every_step_once(outage, wmtp):
    found, *_ = outage
    folder = found.folders["dies"]
    last = steps(folder)[-1] + 3
    before = found.synced["dies"]

    process = wmtp(
        *(*CI, "--set", f"train.steps={last}", "--run-name", "dies", "--resume", folder),
        cwd=folder.parents[5],
    )
    stdout, stderr = process.communicate(timeout=100)

    after = Stored(folder)
    history = after.client.get_metric_history(after.run.info.run_id, "train_loss")
    assert process.returncode == 0, stdout + stderr
    assert after.run.info.run_id == before.run.info.run_id
    assert after.status == "FINISHED"
    assert [point.step for point in history] == list(range(1, last + 1))
    assert after.points() == after.journalled()
