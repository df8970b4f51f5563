"""A delivery belongs to a store and a run: data that a new store never had, or has lost, are sent again."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from weighted_mtp_core.cli import main
from weighted_mtp_core.plan import make_plan
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.tracking.opening import open_recorder
from weighted_mtp_core.tracking.run_history import read_history

RECIPE = """
    [run]
    name = "moved"
    [data]
    use = "example"
    options = { folder = "f" }
    [weighting]
    use = "example.flat"
    [train]
    steps = 4
    [[tracker]]
    use = "core.mlflow"
"""
ARTIFACTS = ["logs", "recipe.toml"]


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Let the tracker lead to another store: a folder with this name."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def use(name):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/{name}")

    return use


@pytest.fixture
def record(write_recipe, example_plugin, use):
    """Record steps of a run, call `during`, and return the run's folder; `resume` continues it."""
    use("one")
    recipe = write_recipe(RECIPE)

    def record(*steps, resume=None, overrides=(), during=lambda run: None):
        plan = make_plan(recipe, overrides=overrides)
        display = Display(Console(file=io.StringIO()))
        with open_recorder(plan, display, resume=resume) as run:
            for step in steps:
                run.metrics("policy", step, {"policy_loss": 1.0 / step})
            during(run)
        return run.folder.path

    return record


@pytest.fixture
def stored(tmp_path):
    """Read the one run back from a store: status, steps, artifacts and the run itself."""

    def stored(name):
        from mlflow import MlflowClient

        client = MlflowClient(f"file://{tmp_path}/{name}")
        experiment = client.get_experiment_by_name("weighted_mtp/example")
        (run,) = client.search_runs([experiment.experiment_id])
        points = client.get_metric_history(run.info.run_id, "policy_loss")
        artifacts = sorted(file.path for file in client.list_artifacts(run.info.run_id))
        return run.info.status, [point.step for point in points], artifacts, run

    return stored


@pytest.fixture
def wait_for(stored, tmp_path, wait_until):
    """Wait until the store `one` has these steps; a file that is just being written can be empty."""

    def has(steps):
        try:
            return any((tmp_path / "one").rglob("policy_loss")) and stored("one")[1] == steps
        except ValueError:  # MLflow's "No data found"
            return False

    return lambda *steps: wait_until(lambda: has(list(steps)))


def test_another_store_gets_the_whole_run_once(record, use, stored, tmp_path, capsys):
    path = record(1, 2, 3)
    use("two")

    assert main(["track", "sync", path.name]) == 0
    told = capsys.readouterr().out
    assert main(["track", "status", path.name]) == 0
    status = capsys.readouterr().out

    assert stored("two")[:3] == ("FINISHED", [1, 2, 3], ARTIFACTS)
    assert (
        f"`core.mlflow` now uses `file:///{tmp_path}/two`; the run was sent to `file:///{tmp_path}/one`"
        in told
    )
    assert f"journal lines and 2 files to `file:///{tmp_path}/two`" in told
    assert f"file:///{tmp_path}/two (complete); file:///{tmp_path}/one (complete)" in status


def test_back_at_the_first_store_only_the_rest_is_sent(record, use, stored, capsys):
    path = record(1, 2)
    use("two")
    record(3, resume=path, overrides=["train.steps=5"])
    use("one")

    main(["track", "sync", "--all"])

    assert stored("two")[:3] == stored("one")[:3] == ("FINISHED", [1, 2, 3], ARTIFACTS)
    assert main(["track", "sync", "--all"]) == 0
    capsys.readouterr()
    assert main(["track", "sync", "--all"]) == 0
    assert not capsys.readouterr().out


def test_all_runs_go_to_another_store(record, use, stored):
    record(1)
    use("two")

    assert main(["track", "sync", "--all"]) == 0

    assert stored("two")[1] == [1]


@pytest.mark.parametrize("command", ["sync", "resume"])
def test_a_run_that_was_deleted_is_sent_anew(record, stored, command, tmp_path, capsys):
    from mlflow import MlflowClient

    path = record(1, 2)
    deleted = stored("one")[3].info.run_id
    MlflowClient(f"file://{tmp_path}/one").delete_run(deleted)

    if command == "sync":
        main(["track", "sync", path.name])
        assert f"no longer has the run `{deleted}`; the whole run is sent again" in capsys.readouterr().out
    else:
        record(3, resume=path)

    status, steps, artifacts, run = stored("one")
    assert (status, artifacts) == ("FINISHED", ARTIFACTS)
    assert steps == [1, 2, 3][: 2 + (command == "resume")]
    assert run.info.run_id != deleted


def test_a_restored_database_gets_what_it_lost(record, stored, tmp_path, wait_for, capsys):
    def back_up(_):
        wait_for(1, 2)
        shutil.copytree(tmp_path / "one", tmp_path / "copy")

    path = record(1, 2, during=back_up)
    record(3, 4, resume=path)
    shutil.rmtree(tmp_path / "one")
    shutil.copytree(tmp_path / "copy", tmp_path / "one")
    assert stored("one")[:2] == ("RUNNING", [1, 2])

    assert main(["track", "sync", path.name]) == 0

    assert "has lost steps of 1 metrics, such as `policy_loss`" in capsys.readouterr().out
    assert stored("one")[:3] == ("FINISHED", [1, 2, 3, 4], ARTIFACTS)


def test_a_run_that_is_deleted_while_it_goes_on_is_sent_anew(record, stored, tmp_path, wait_for):
    from mlflow import MlflowClient

    deleted = []

    def delete(_):
        wait_for(1, 2)
        deleted.append(stored("one")[3].info.run_id)
        MlflowClient(f"file://{tmp_path}/one").delete_run(deleted[0])

    path = record(1, 2, during=delete)

    status, steps, artifacts, run = stored("one")
    assert (status, steps, artifacts) == ("FINISHED", [1, 2], ARTIFACTS)
    assert [run.info.run_id] != deleted
    assert "the whole run is sent again to" in (path / "logs" / "training.log").read_text()


def test_a_store_that_is_restored_while_the_run_goes_on_gets_what_it_lost(record, stored, tmp_path, wait_for):
    def restore(run):
        wait_for(1)
        shutil.copytree(tmp_path / "one", tmp_path / "copy")
        run.metrics("policy", 2, {"policy_loss": 1.0 / 2})
        wait_for(1, 2)
        shutil.rmtree(tmp_path / "one")
        shutil.copytree(tmp_path / "copy", tmp_path / "one")
        run.metrics("policy", 3, {"policy_loss": 1.0 / 3})

    record(1, during=restore)

    assert stored("one")[:3] == ("FINISHED", [1, 2, 3], ARTIFACTS)


def test_a_resumed_run_is_described_by_its_new_recipe_everywhere(record, use, stored):
    from mlflow.artifacts import download_artifacts

    path = record(1)
    before = stored("one")[3].data
    record(2, resume=path, overrides=["train.steps=9", 'run.tags=["team:new"]'])
    after = stored("one")[3]
    use("two")
    main(["track", "sync", path.name])
    history = read_history(path)

    plan = make_plan(path / "recipe.toml")
    assert plan.recipe.train.steps == 9
    assert history.params["train.steps"] == "9"
    assert after.data.tags["wmtp.recipe_sha256"] == plan.recipe_sha256
    assert after.data.tags["wmtp.recipe_sha256"] != before.tags["wmtp.recipe_sha256"]
    assert after.data.tags["wmtp.changed.train.steps"] == "9"
    assert after.data.tags["team"] == "new"
    assert Path(download_artifacts(f"{after.info.artifact_uri}/recipe.toml")).read_text() == plan.recipe_toml
    assert stored("two")[3].data.params["train.steps"] == "9"
    assert stored("two")[3].data.tags["wmtp.recipe_sha256"] == plan.recipe_sha256


def test_a_resume_that_changes_nothing_describes_nothing(record):
    path = record(1)
    lines = (path / "metrics.jsonl").read_text().count('"kind":"params"')

    record(2, resume=path)

    assert (path / "metrics.jsonl").read_text().count('"kind":"params"') == lines
    assert "wmtp.changed" not in str(read_history(path).tags)
