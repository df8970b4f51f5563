"""`compare` executes the missing runs, compares the arms, and is recorded in MLflow as the runs' parent."""

import csv
import json
import shutil
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
ARMS = ("configs/study/uniform.toml", "configs/study/dft.toml")
QUICK = (
    *("--preset", "ci", "--executor", "local:2", "--set", "data.options.problems=40"),
    *("--set", "evaluate.problems=2", "--set", "train.steps=4"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    shutil.copytree(CONFIGS, folder / "configs")
    return folder


@pytest.fixture(scope="module")
def one_seed(wmtp, folder):
    return wmtp("compare", *ARMS, *QUICK, "--seeds", "1", "--out", "one", cwd=folder)


@pytest.fixture(scope="module")
def two_seeds(one_seed, wmtp, folder):
    assert one_seed.returncode == 0, one_seed.stderr
    found = wmtp("compare", *ARMS, *QUICK, "--seeds", "2", "--out", "two", cwd=folder)
    assert found.returncode == 0, found.stderr
    return found


def rows(file):
    table = csv.DictReader(file.read_text().splitlines())
    return [row for row in table if row["metric"] == "test_ce_head_1"]


def test_what_is_finished_is_not_run_again(one_seed, two_seeds):
    assert one_seed.stderr.count(": begins, ") == 2
    assert two_seeds.stderr.count(": begins, ") == 2


def test_each_arm_is_there_with_its_seeds_and_its_difference_to_the_first(two_seeds, folder):
    first, other = rows(folder / "two" / "compare.csv")

    assert [(first["arm"], first["seeds"]), (other["arm"], other["seeds"])] == [
        ("uniform", "2"),
        ("dft", "2"),
    ]
    assert first["p_value"] == ""
    assert float(other["difference"]) == pytest.approx(float(other["mean"]) - float(first["mean"]))


def test_a_seed_has_its_value_in_whichever_table(two_seeds, folder):
    one, two = (json.loads((folder / each / "compare.json").read_text())["rows"] for each in ("one", "two"))
    values = {(row["metric"], row["at"], row["arm"]): row["values"]["42"] for row in two}

    steps = [row for row in one if row["at"] == "equal steps"]
    assert all(values[row["metric"], row["at"], row["arm"]] == row["values"]["42"] for row in steps)


def test_the_table_is_printed_and_says_what_two_seeds_cannot_show(two_seeds):
    assert "## `test_ce_head_1`, at equal steps" in two_seeds.stdout
    assert "With 2 pairs it cannot be below 0.5." in two_seeds.stdout


def test_mlflow_has_the_comparison_as_the_parent_of_its_runs(two_seeds, folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'storage' / 'mlflow.db'}")
    runs = {
        each.name: client.search_runs([each.experiment_id])
        for each in client.search_experiments()
        if each.name != "Default"
    }
    parents = {each.info.run_name: each for each in runs.pop("weighted_mtp/compare")}
    parent = parents["two"]

    children = [run for found in runs.values() for run in found]
    assert [run.data.tags["mlflow.parentRunId"] for run in children] == 4 * [parent.info.run_id]
    assert parent.data.metrics["test_ce_head_1/dft"] > 0
    assert {each.path for each in client.list_artifacts(parent.info.run_id, "compare")} >= {
        "compare/compare.md",
        "compare/validation_ce_head_1.svg",
    }


def test_runs_in_mlflow_give_the_same_table(wmtp, two_seeds, folder, tmp_path):
    # A copy, because the latest comparison becomes the parent of its runs in MLflow.
    copied = shutil.copytree(folder, tmp_path / "copied")
    experiments = ("--experiment", "weighted_mtp/baseline_mtp", "--experiment", "weighted_mtp/dft")
    stored = wmtp("compare", *experiments, "--out", "stored", cwd=copied)

    assert stored.returncode == 0, stored.stderr
    assert rows(copied / "stored" / "compare.csv") == rows(folder / "two" / "compare.csv")
