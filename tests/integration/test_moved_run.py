"""A run that was recorded on a laptop is sent to a team's server and continues there (docs/tracking.md)."""

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE = """\
extends = ["{configs}/baseline.toml"]
[data]
options.problems = 40
[train]
steps = 4
batch_size = 4
log_every = 1
validate_every = 2
validation_examples = 8
[evaluate]
problems = 2
max_new_tokens = 8
"""


@pytest.fixture
def wmtp_in(wmtp):
    """Run a command in a folder, and return its output."""

    def wmtp_in(cwd, *arguments, **changes):
        process = wmtp(*arguments, cwd=cwd, **changes)
        stdout, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stdout + stderr
        return stdout

    return wmtp_in


def only_run(cwd):
    (file,) = (cwd / "storage" / "runs").rglob("run.json")
    return file.parent


def test_a_run_of_a_laptop_is_sent_to_a_server_and_resumed_elsewhere(wmtp_in, stored, tmp_path):
    laptop, machine = tmp_path / "laptop", tmp_path / "machine"
    for folder in (laptop, machine):
        folder.mkdir()
        (folder / "recipe.toml").write_text(RECIPE.format(configs=CONFIGS))
    wmtp_in(laptop, "run", "recipe.toml", MLFLOW_TRACKING_URI=None)
    local = only_run(laptop)
    on_laptop = stored(local, f"sqlite:///{laptop}/storage/mlflow.db")

    shutil.copytree(laptop / "storage" / "runs", machine / "storage" / "runs")
    moved = only_run(machine)
    told = wmtp_in(machine, "track", "sync", moved.name)
    synced = stored(moved)

    assert "journal lines and " in told
    assert synced.status == "FINISHED"
    assert synced.points() == on_laptop.points() == synced.journalled()
    assert synced.file("checkpoints/best_model.pt") == on_laptop.file("checkpoints/best_model.pt")

    wmtp_in(machine, "run", "recipe.toml", "--resume", moved.name, "--set", "train.steps=6")
    status = wmtp_in(machine, "track", "status", moved.name)
    resumed = stored(moved)

    assert resumed.status == "FINISHED"
    assert resumed.run.info.run_id == synced.run.info.run_id
    assert resumed.points() == resumed.journalled()
    assert [step for name, step, *_ in resumed.points() if name == "train_loss"] == [1, 2, 3, 4, 5, 6]
    assert set(on_laptop.points()) < set(resumed.points())
    assert resumed.run.data.tags["wmtp.changed.train.steps"] == "6"
    assert resumed.file("recipe.toml") == (moved / "recipe.toml").read_bytes()
    assert "(complete)" in status
