"""MLflow's own client reads back what a run recorded, on every kind of store."""

import os
import subprocess
import sys
import time
from textwrap import dedent

import pytest

pytestmark = pytest.mark.slow


def test_the_store_holds_exactly_what_the_journal_holds(open_recorder, stored, store):
    checkpoint = os.urandom(20_000_000)
    with open_recorder(**store) as record:
        for step in range(1, 201):
            record.metrics("policy", step, {f"m{i}": step / (i + 1) for i in range(20)})
            record.timings("policy", step, {"tokens_per_second": 1e4 + step})
        record.metrics("policy", 201, {"bad": float("nan"), "worse": float("inf"), "worst": -float("inf")})
        (record.folder.checkpoints / "best_model.pt").write_bytes(checkpoint)
        record.artifact(record.folder.checkpoints / "best_model.pt", "checkpoints")

    run = stored(record.folder.path, store.get("tracking_uri"))

    assert run.status == "FINISHED"
    assert run.points() == run.journalled()
    assert len(run.points()) == 200 * 21
    assert run.file("checkpoints/best_model.pt") == checkpoint
    assert run.file("recipe.toml") == record.folder.recipe.read_bytes()
    assert b"`bad` is nan" in run.file("logs/training.log")


def test_keep_local_false_drops_the_checkpoint_that_the_store_has(open_recorder, stored):
    with open_recorder(keep_local=False) as record:
        best = record.folder.checkpoints / "best_model.pt"
        best.write_bytes(b"weights" * 1000)
        record.artifact(best, "checkpoints")

    assert not best.exists()
    assert record.folder.log.exists()
    assert stored(record.folder.path).file("checkpoints/best_model.pt") == b"weights" * 1000


def test_awkward_params_start_a_run_in_under_five_seconds(open_recorder, stored):
    params = {f"table.{i}.inner[0]": str(i) for i in range(250)}
    params |= {"long": "x" * 20_000, "nul": "a\0b", "emoji=@%": "\N{ROCKET}" * 20_000, "a[0]=@%": "1"}
    began = time.monotonic()

    record = open_recorder(params=params)
    took = time.monotonic() - began
    with record:
        pass
    run = stored(record.folder.path)
    kept = run.run.data.params

    assert took < 5
    assert len(kept) == len(params)
    assert kept["table.7.inner_0_"] == "7"
    assert kept["a_0____"] == "1"
    assert kept["nul"] == "a\N{REPLACEMENT CHARACTER}b"
    assert kept["long"].startswith("x" * 5000)
    assert "[cut: 20000 characters, " in kept["long"]
    assert kept["emoji___"].startswith("\N{ROCKET}" * 1000)
    assert run.file("recipe.toml") == record.folder.recipe.read_bytes()


TWENTY = """
    import multiprocessing, os, sys
    from pathlib import Path
    from weighted_mtp_core.api import BuildContext, DatasetVersion, MetricPoint, RunInfo, RunOutcome
    from weighted_mtp_core.builtin import _mlflow_tracker
    from weighted_mtp_core.builtin.mlflow import MlflowOptions, build_mlflow

    uri, folder = sys.argv[1:]
    data = DatasetVersion(name="data", version="1", sha256="f" * 64)
    # imports and mappings, once instead of twenty times on two cores
    _mlflow_tracker.MlflowClient(f"sqlite:///{folder}/warm.db").search_experiments()

    def one(number):
        context = BuildContext(seed=0, storage=Path(folder))
        tracker = build_mlflow(MlflowOptions(tracking_uri=uri), context)
        tracker.start(RunInfo(
            run_id=f"{os.getpid()}-{number}", name="r", experiment="twenty/at_once",
            params={"number": str(number)}, tags={}, datasets=(data,), folder=Path(folder),
        ))
        tracker.log_metrics([MetricPoint(name="loss", value=1.0, step=1, time_ms=1)])
        tracker.finish(RunOutcome.FINISHED)

    children = [multiprocessing.get_context("fork").Process(target=one, args=(i,)) for i in range(20)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    sys.exit(sum(child.exitcode != 0 for child in children))
"""


@pytest.mark.parametrize("store", ["server", "sqlite"])
def test_twenty_processes_start_in_a_new_experiment_with_the_same_data_at_once(stack, tmp_path, store):
    uri = stack.uri if store == "server" else f"sqlite:///{tmp_path}/fresh.db"

    failed = subprocess.run(
        [sys.executable, "-c", dedent(TWENTY), uri, tmp_path], capture_output=True, text=True, check=False
    )

    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [each for each in client.search_experiments() if each.name == "twenty/at_once"]
    runs = client.search_runs([each.experiment_id for each in experiments])
    assert failed.returncode == 0, failed.stderr[-3000:]
    assert len(experiments) == 1
    assert [run.info.status for run in runs] == ["FINISHED"] * 20
    assert [[used.dataset.digest for used in run.inputs.dataset_inputs] for run in runs] == [["f" * 36]] * 20
