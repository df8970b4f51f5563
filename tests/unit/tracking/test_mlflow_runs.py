"""Finished runs in an MLflow store become arms; runs that do not belong together are refused."""

import pytest
from weighted_mtp_core.compare.mlflow_runs import read_stored
from weighted_mtp_core.errors import WmtpError

PARAMS = {"train.steps": "20", "weighting.use": "example.flat", "weighting.options.beta": "1.0"}


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A client of an empty store."""
    from mlflow import MlflowClient

    uri = f"file://{tmp_path / 'store'}"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(uri)


@pytest.fixture
def finish(client):
    """Store a run with params, tags and a curve; return its id."""
    experiment = client.create_experiment("group/study")

    def finish(name, seed, *, status="FINISHED", source="a1", **params):
        run = client.create_run(experiment, run_name=name).info.run_id
        changed = {key.replace("__", "."): value for key, value in params.items()}
        for key, value in {**PARAMS, "run.seed": str(seed), **changed}.items():
            client.log_param(run, key, value)
        client.set_tag(run, "wmtp.source_sha256", source)
        for step in (10, 20):
            client.log_metric(run, "policy_learning_rate", 1e-3, timestamp=1000 * step, step=step)
        client.log_metric(run, "pass_at_1", 0.1 * seed, timestamp=30_000, step=20)
        if status != "RUNNING":
            client.set_terminated(run, status)
        return run

    return finish


@pytest.fixture
def read(tmp_path):
    def read(*run_ids, experiments=("group/study",), allowed=()):
        return read_stored(experiments=experiments, run_ids=run_ids, allowed=allowed, storage=tmp_path)

    return read


def test_the_runs_of_an_experiment_are_arms_by_name_and_seed(finish, read):
    for name in ("one", "two"):
        for seed in (2, 1):
            finish(name, seed)

    found = read()

    values = {
        arm: {s: run.last["pass_at_1"] for s, run in each.items()} for arm, each in found.measures.items()
    }
    assert values == {arm: pytest.approx({1: 0.1, 2: 0.2}) for arm in ("one", "two")}


def test_seeds_of_one_arm_with_other_options_of_the_weighting_are_refused(finish, read):
    finish("one", 1)
    finish("one", 2, weighting__options__beta="0.5")

    with pytest.raises(WmtpError) as caught:
        read()

    assert str(caught.value) == (
        "`one, seed 2` cannot be compared with `one, seed 1`:\n"
        "  weighting.options.beta: 1.0 in `one, seed 1`, 0.5 in `one, seed 2`"
    )
    read(allowed=["weighting.options.beta"])


def test_arms_may_differ_in_their_weighting_but_not_in_their_budget(finish, read):
    finish("one", 1)
    finish("two", 1, weighting__options__beta="0.5")
    read()
    finish("three", 1, train__steps="30")

    with pytest.raises(WmtpError, match=r"train\.steps: (20|30) in `.*`, (20|30) in `.*`"):
        read()


def test_seeds_of_one_arm_with_other_code_are_refused(finish, read):
    finish("one", 1)
    finish("one", 2, source="b2")

    with pytest.raises(WmtpError, match="the runs of `one` used different code"):
        read()
    read(allowed=["wmtp.source_sha256"])


def test_a_run_that_was_resumed_with_another_recipe_is_refused(client, finish, read):
    run = finish("one", 1)
    client.set_tag(run, "wmtp.changed.checkpoint.every", "7")
    read()
    client.set_tag(run, "wmtp.changed.train.steps", "30")

    with pytest.raises(WmtpError) as caught:
        read()

    assert str(caught.value) == f"the run `{run}` of `one` was resumed with another `train.steps`"
    assert caught.value.hint.endswith("--allow-difference train.steps")
    read(allowed=["train.steps"])


@pytest.mark.parametrize("status", ["RUNNING", "KILLED", "FAILED"])
def test_a_run_that_is_not_finished_is_refused_by_its_id_and_left_out_of_its_experiment(finish, read, status):
    finish("one", 1)
    run = finish("one", 2, status=status)

    assert list(read().runs["one"]) == [1]
    with pytest.raises(WmtpError, match=f"the run `{run}` is not finished: its status is {status}"):
        read(run, experiments=())


def test_an_experiment_with_more_runs_than_a_page_of_the_store_is_read_to_its_end(finish, read, monkeypatch):
    monkeypatch.setattr("weighted_mtp_core.compare.mlflow_runs._PAGE", 2)
    for seed in range(1, 6):
        finish("one", seed)

    assert read().seeds == [1, 2, 3, 4, 5]
