"""`run configs/verifiable.toml` executes all stages, and a second run gives the same numbers."""

import math
from pathlib import Path

import pytest

VERIFIABLE = str(Path(__file__).parents[2] / "configs" / "verifiable.toml")
FEW_PROBLEMS = ("--set", "data.options.problems=40", "--set", "data.options.twins=1")
CI = ("--preset", "ci", *FEW_PROBLEMS)


@pytest.fixture(scope="module")
def verifiable(wmtp, tmp_path_factory):
    return wmtp("run", VERIFIABLE, *CI, cwd=tmp_path_factory.mktemp("first"), env={"PYTHONHASHSEED": "0"})


@pytest.fixture(scope="module")
def mlflow_run(verifiable, tracked):
    return tracked(verifiable.storage)


@pytest.fixture(scope="module")
def client(verifiable):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{verifiable.storage / 'mlflow.db'}")


def test_the_run_succeeds(verifiable):
    assert verifiable.returncode == 0, verifiable.stderr


def test_the_run_folder_is_named_by_experiment_and_recipe_and_holds_everything(verifiable):
    names = {str(path.relative_to(verifiable.folder)) for path in verifiable.folder.rglob("*")}

    assert verifiable.folder.parts[-4:-2] == ("weighted_mtp", "verifiable")
    assert {"recipe.toml", "metrics.jsonl", "checkpoints/best_model.pt", "logs/training.log"} <= names


def test_the_end_says_what_was_learnt_and_where_the_run_is(verifiable):
    assert "pass at 1" in verifiable.stdout
    assert str(verifiable.folder) in verifiable.stdout
    assert (
        f"python -m mlflow ui --backend-store-uri sqlite:///{verifiable.storage / 'mlflow.db'}"
        in verifiable.stdout
    )


def test_without_a_terminal_there_are_plain_lines(verifiable):
    assert "\x1b" not in verifiable.stdout + verifiable.stderr
    assert "it/s" not in verifiable.stdout + verifiable.stderr  # another library's progress bar


def test_mlflow_holds_one_finished_run_in_the_experiment_of_the_plugin(verifiable, mlflow_run, client):
    experiment = client.get_experiment(mlflow_run.info.experiment_id)

    assert experiment.name == "weighted_mtp/verifiable"
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.info.end_time is not None


def test_tags_name_algorithm_components_plugins_and_recipe(mlflow_run):
    tags = mlflow_run.data.tags

    assert tags["algo"] == "verifiable"
    assert tags["wmtp.weighting"] == "verifiable.success_ratio"
    assert tags["wmtp.critic"] == "verifiable.language_models"
    assert tags["wmtp.data"] == "code_tasks.micro_chain"
    assert tags["wmtp.plugin.verifiable"] == "weighted-mtp-verifiable==0.1.0"
    assert tags["wmtp.plugin.core"] == "weighted-mtp-core==0.1.0"
    assert len(tags["wmtp.recipe_sha256"]) == 64
    assert tags["model_version"]


@pytest.mark.parametrize("name", ["value_loss", "success_ratio_mean", "weight_entropy"])
def test_metrics_that_dashboards_read_have_histories(verifiable, mlflow_run, client, name):
    history = client.get_metric_history(mlflow_run.info.run_id, name)

    assert len(history) >= 2
    assert all(math.isfinite(point.value) for point in history)


def test_mlflow_holds_exactly_the_metrics_of_the_journal(verifiable, mlflow_run, client):
    journal = {
        (name, line["step"], value)
        for line in verifiable.journal
        for name, value in line["metrics"].items()
        if isinstance(value, float | int)
    }
    names = {name for name, _, _ in journal}

    stored = {
        (name, point.step, point.value)
        for name in names
        for point in client.get_metric_history(mlflow_run.info.run_id, name)
    }

    assert stored == journal


def test_the_data_are_named_by_version_and_checksum(mlflow_run):
    (dataset_input,) = mlflow_run.inputs.dataset_inputs

    assert mlflow_run.data.params["data.version"]
    assert len(mlflow_run.data.params["data.sha256"]) == 64
    assert dataset_input.dataset.name == "micro_chain"


@pytest.mark.parametrize("path", ["checkpoints/best_model.pt", "logs/training.log"])
def test_checkpoint_and_log_are_artifacts(mlflow_run, client, path):
    folder = path.split("/", maxsplit=1)[0]
    stored = {artifact.path for artifact in client.list_artifacts(mlflow_run.info.run_id, folder)}

    assert path in stored


def test_the_best_checkpoint_is_weights_only(verifiable):
    import torch

    state = torch.load(verifiable.folder / "checkpoints" / "best_model.pt", weights_only=True)

    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())


def test_another_machine_folder_and_hash_seed_give_the_same_journal(verifiable, wmtp, tmp_path):
    again = wmtp("run", VERIFIABLE, *CI, cwd=tmp_path, env={"PYTHONHASHSEED": "1"})

    assert again.returncode == 0, again.stderr
    assert again.journal == verifiable.journal


def test_the_resolved_recipe_runs_again_to_the_same_journal(verifiable, wmtp, tmp_path):
    resolved = verifiable.folder / "recipe.toml"

    again = wmtp("run", str(resolved), cwd=tmp_path)

    assert again.returncode == 0, again.stderr
    assert again.journal == verifiable.journal
    assert (again.folder / "recipe.toml").read_text() == resolved.read_text()
