"""A run that is stopped or killed at any moment and resumed has the result of an uninterrupted run."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch

CONFIGS = Path(__file__).parents[2] / "configs"
TD_ERROR, BASELINE = str(CONFIGS / "study" / "td_error.toml"), str(CONFIGS / "baseline.toml")
CI = ("--preset", "ci", "--set", "data.options.problems=40", "--set", "checkpoint.every=1")
STEPS = 20
UNTRACKED = (
    *("--set", "tracker=[]"),
    *("--set", f"critic.train.steps={STEPS}", "--set", f"train.steps={STEPS}"),
)


def metrics(folder):
    """The metric lines of a run's journal, without the time that is different in every run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{**line, "time": None} for line in lines if line["kind"] == "metrics"]


def folder_of(storage, name):
    (found,) = (file.parent for file in (storage / "runs").glob(f"*/*/{name}/*/run.json"))
    return found


def checkpoints(storage, name):
    """Return the names of a run's checkpoints, oldest first; empty if there are none yet."""
    return sorted(path.name for path in (storage / "runs").glob(f"*/*/{name}/*/checkpoints/*-[0-9]*"))


def wait_for(condition, process, *, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never came that far"
        time.sleep(0.01)


def test_a_run_killed_ten_times_ends_with_the_bits_of_one_that_was_never_stopped(wmtp, start, tmp_path):
    whole = wmtp("run", TD_ERROR, *CI, *UNTRACKED, "--run-name", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    storage = whole.storage
    chance = random.Random(0)
    moments = sorted(("critic", step) for step in chance.sample(range(1, STEPS), 4))
    moments += sorted(("policy", step) for step in chance.sample(range(1, STEPS), 4))
    moments += [("policy", STEPS), ("policy", STEPS)]  # killed when its evaluation begins

    killed = 0
    for stage, step in moments:
        going_on = ("--resume", str(folder_of(storage, "killed"))) if killed else ()
        process = start("run", TD_ERROR, *CI, *UNTRACKED, "--run-name", "killed", *going_on, cwd=tmp_path)
        at = f"{stage}-{step:08d}"
        wait_for(lambda at=at: (checkpoints(storage, "killed") or [""])[-1] >= at, process)
        time.sleep(chance.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        killed += 1
    resumed = wmtp(
        *("run", TD_ERROR, *CI, *UNTRACKED, "--run-name", "killed"),
        *("--resume", str(folder_of(storage, "killed"))),
        cwd=tmp_path,
    )

    assert killed == 10
    assert resumed.returncode == 0, resumed.stderr
    first, second = folder_of(storage, "whole"), folder_of(storage, "killed")
    assert metrics(second) == metrics(first)
    assert (first / "checkpoints" / "best_model.pt").read_bytes() == (
        second / "checkpoints" / "best_model.pt"
    ).read_bytes()
    assert same_tensors(first, second, f"policy-{STEPS:08d}")


def same_tensors(first, second, name):
    from safetensors.torch import load_file

    tensors = [load_file(run / "checkpoints" / name / "state.safetensors") for run in (first, second)]
    return tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items()
    )


ENDLESS = (BASELINE, *CI, "--set", "train.steps=100000", "--set", "train.log_every=1")


@pytest.fixture(scope="module")
def stopped(wmtp, start, tmp_path_factory):
    """A run that SIGTERM ended, and the result of a second process that tried to resume it before that."""
    cwd = tmp_path_factory.mktemp("stopped")
    storage = cwd.resolve() / "storage"
    process = start("run", *ENDLESS, cwd=cwd)
    wait_for(lambda: len(checkpoints(storage, "baseline_uniform")) > 1, process)
    folder = folder_of(storage, "baseline_uniform")
    second = wmtp("run", *ENDLESS, "--resume", str(folder), cwd=cwd)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr, second, folder, cwd


def test_a_second_process_on_one_run_is_refused(stopped):
    *_, second, folder, _ = stopped

    assert second.returncode == 2
    assert f"error: the run folder `{folder}` is in use by process" in second.stderr


def test_sigterm_ends_a_run_with_a_checkpoint_and_its_own_exit_code(stopped):
    code, stderr, _, folder, _ = stopped
    last = metrics(folder)[-1]["step"]

    assert code == 143
    assert "Traceback" not in stderr
    assert json.loads((folder / "run.json").read_text())["status"] == "KILLED"
    assert (folder / "checkpoints" / f"policy-{last:08d}").is_dir()


def test_a_run_does_not_go_on_with_another_recipe(stopped, wmtp):
    *_, folder, cwd = stopped

    run = wmtp(
        *("run", *ENDLESS, "--set", "train.learning_rate=0.5", "--set", "loss.normalise=tokens"),
        *("--resume", str(folder), "--allow-change", "train.learning_rate"),
        cwd=cwd,
    )

    assert run.returncode == 2
    assert "cannot continue with these changes:\n  loss.normalise: weights -> tokens\nhint: " in run.stderr
    assert "--allow-change loss.normalise" in run.stderr


def test_a_resumed_run_goes_on_in_the_same_mlflow_run_with_every_step_once(stopped, wmtp, tracked):
    from mlflow import MlflowClient

    *_, folder, cwd = stopped
    done = metrics(folder)[-1]["step"]
    before = tracked(cwd / "storage")

    run = wmtp(
        *("run", *ENDLESS, "--set", f"train.steps={done + 3}", "--resume", str(folder)),
        cwd=cwd,
    )

    assert run.returncode == 0, run.stderr
    assert json.loads((folder / "run.json").read_text())["changed"] == ["train.steps"]
    assert f"continuing run {folder.name} from step {done} of stage `policy`" in run.stdout
    after = tracked(cwd / "storage")
    assert (before.info.status, after.info.status) == ("KILLED", "FINISHED")
    assert after.info.run_id == before.info.run_id
    client = MlflowClient(f"sqlite:///{cwd / 'storage' / 'mlflow.db'}")
    steps = [point.step for point in client.get_metric_history(after.info.run_id, "train_loss")]
    assert steps == list(range(1, done + 4))
