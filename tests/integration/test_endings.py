"""However a run ends, the server has its status, end time and log."""

from textwrap import dedent

import pytest
from weighted_mtp_core.tracking.sync import run_status

pytestmark = pytest.mark.slow

ENDS = """
    import multiprocessing, os, signal, sys, time
    from pathlib import Path
    from weighted_mtp_core.api import BuildContext, RunInfo
    from weighted_mtp_core.builtin.mlflow import MlflowOptions, build_mlflow
    from weighted_mtp_core.tracking.display import Display
    from weighted_mtp_core.tracking.recorder import Recorder
    from weighted_mtp_core.tracking.run_folder import RunFolder

    def run(ending):
        folder = RunFolder.create(Path("runs"), experiment="weighted_mtp/endings", name=ending)
        info = RunInfo(
            run_id=folder.run_id, name=ending, experiment="weighted_mtp/endings", params={}, tags={},
            datasets=(), folder=folder.path,
        )
        tracker = build_mlflow(MlflowOptions(), BuildContext(seed=0, storage=Path("storage")))
        trackers = {"0-core.mlflow": tracker}
        with Recorder.open(folder, info, trackers=trackers, recipe_toml="", display=Display()) as record:
            record.metrics("policy", 1, {"loss": 1.0})
            match ending:
                case "exception":
                    raise ZeroDivisionError
                case "exit-0":
                    sys.exit(0)
                case "exit-3":
                    sys.exit(3)
                case "sigint":
                    os.kill(os.getpid(), signal.SIGINT)
                case "sigterm":
                    os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    from weighted_mtp_core.builtin import _mlflow_tracker  # once, not five times

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=run, args=(ending,)) for ending in sys.argv[1:]]
    for child in children:
        child.start()
    for child in children:
        child.join()
"""
ENDINGS = {
    "exception": "FAILED",
    "exit-0": "FINISHED",
    "exit-3": "FAILED",
    "sigint": "KILLED",
    "sigterm": "KILLED",
}


@pytest.fixture(scope="module")
def ended(start, tmp_path_factory):
    """The run folder for each way to end; all runs end at the same time."""
    cwd = tmp_path_factory.mktemp("endings")
    start("-c", dedent(ENDS), *ENDINGS, cwd=cwd).communicate(timeout=100)
    return {path.parents[1].name: path.parent for path in cwd.rglob("run.json")}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_server_has_status_end_time_and_log(ended, stored, ending):
    run = stored(ended[ending])

    assert run.status == ENDINGS[ending]
    assert run.run.info.end_time >= run.run.info.start_time
    assert f"run {run.status}" in run.file("logs/training.log").decode()
    assert run.points() == run.journalled()
    assert not any(run_status(ended[ending]).pending.values())
