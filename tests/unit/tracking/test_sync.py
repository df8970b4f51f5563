"""After the run: `track status` shows what is pending, `track sync` sends it, here to a `file:` store."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from rich.console import Console
from weighted_mtp_core.api import RunOutcome, WmtpError
from weighted_mtp_core.cli import main
from weighted_mtp_core.plan import make_plan
from weighted_mtp_core.tracking import opening
from weighted_mtp_core.tracking import sync as module
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.tracking.run_folder import RunFolder, find_run
from weighted_mtp_core.tracking.sync import DIED, amend_run, run_status, sync_run


@pytest.fixture
def finished(open_recorder, notebook, monkeypatch):
    """Record a run with a tracker in some state, then bring the tracker back and forget its calls."""
    monkeypatch.setattr(module, "make_plan", lambda _: None)
    monkeypatch.setattr(module, "build_trackers", lambda _: {"0-notebook": notebook})

    def finished(*, outcome=RunOutcome.FINISHED, **state):
        record = open_recorder(close_seconds=0.1 if "away" in state else 2.0, **{"0-notebook": notebook})
        for name, value in state.items():
            setattr(notebook, name, value)
        record.metrics("policy", 1, {"policy_loss": 0.5})
        record.finish(outcome)
        for uploader in record._uploaders:
            uploader._thread.join()  # it must not deliver after the tracker is back
        notebook.told.clear()
        notebook.away, notebook.no_files, notebook.refuses = False, False, ""

    return finished


def pending(folder):
    return run_status(folder.path).pending["0-notebook"]


def test_a_delivered_run_has_nothing_pending(finished, folder):
    finished()

    assert run_status(folder.path).status == "FINISHED"
    assert not pending(folder)


def test_what_an_outage_kept_back_is_sent_in_order(finished, folder, notebook):
    finished(away=True)

    left = sync_run(folder.path, log=print, limit_s=5)

    assert not left["0-notebook"]
    assert [what for what, _ in notebook.told][-3:] == ["metrics", "artifact", "finish"]
    assert not pending(folder)


def test_a_file_that_could_not_be_stored_is_stored_and_the_run_closed_again(finished, folder, notebook):
    finished(no_files=True)
    before = pending(folder)

    sync_run(folder.path, log=print, limit_s=5)

    assert (before.lines, before.files) == (0, 2)
    assert notebook.all("artifact") == ["/recipe.toml", "logs/training.log"]
    assert notebook.all("finish") == [RunOutcome.FINISHED]
    assert notebook.points() == []
    assert not pending(folder)


def test_what_was_refused_is_tried_again(finished, folder, notebook):
    finished(refuses="artifact")

    sync_run(folder.path, log=print, limit_s=5)

    assert "logs/training.log" in notebook.all("artifact")
    assert not pending(folder)


@pytest.mark.parametrize("own", [RunOutcome.FINISHED, RunOutcome.KILLED])
def test_an_amended_run_gets_its_own_status_back(finished, folder, notebook, own):
    finished(outcome=own)
    failed = {"tags": {"storage_sync": "False"}, "outcome": RunOutcome.FAILED}

    for _ in range(2):
        amend_run(folder.path, **failed, log=print)
    assert run_status(folder.path).status == "FAILED"
    for _ in range(2):
        amend_run(folder.path, tags={"storage_sync": "True"}, outcome=None, log=print)

    assert run_status(folder.path).status == own.value
    assert notebook.all("finish")[-1] is own


def test_a_run_that_goes_on_is_left_alone(folder, journal, holder):
    with pytest.raises(WmtpError, match="is in use by process"):
        sync_run(folder.path, log=print, limit_s=1)


DIES = """
    import os, signal, sys
    from pathlib import Path
    from weighted_mtp_core.plan import make_plan
    from weighted_mtp_core.tracking.display import Display
    from weighted_mtp_core.tracking.opening import open_recorder

    plan = make_plan(Path(sys.argv[1]))
    with open_recorder(plan, Display()) as record:
        for step in range(1, 4):
            record.metrics("policy", step, {"policy_loss": 1.0 / step})
        os.kill(os.getpid(), signal.SIGKILL)
"""
RECIPE = """
    [run]
    name = "dies"
    [data]
    use = "example"
    options = { folder = "f" }
    [weighting]
    use = "example.flat"
    [[tracker]]
    use = "core.mlflow"
    [tracker.options]
    tracking_uri = "file://FOLDER/filestore"
"""


@pytest.fixture
def dead(example_plugin, write_recipe, site, monkeypatch):
    """The folder of a run that was killed after sending its first lines."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    recipe = write_recipe(RECIPE.replace("FOLDER", str(Path.cwd())))
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.run([sys.executable, "-c", dedent(DIES), recipe], env=environment, check=False)
    assert process.returncode == -signal.SIGKILL
    (folder,) = (file.parent for file in Path("storage/runs").rglob("run.json"))
    return folder.absolute()


def test_a_killed_run_is_shown_as_dead_then_sent_whole_and_closed_as_killed(dead, capsys):
    assert main(["track", "status"]) == 0
    shown = capsys.readouterr().out
    assert main(["track", "sync", dead.name]) == 0
    from mlflow import MlflowClient

    client = MlflowClient(f"file://{Path.cwd()}/filestore")
    experiment = client.get_experiment_by_name("weighted_mtp/example")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "policy_loss")

    assert DIED in shown
    assert "core.mlflow: " in shown
    assert run.info.status == "KILLED"
    assert [point.step for point in history] == [1, 2, 3]
    assert run.info.end_time == max(point.timestamp for point in history)
    assert json.loads((dead / "run.json").read_text())["status"] == "KILLED"
    assert main(["track", "sync", "--all"]) == 0
    assert run_status(dead).status == "KILLED"


def test_the_next_run_sends_what_an_earlier_one_could_not(write_recipe, example_plugin, monkeypatch, screen):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    recipe = write_recipe(RECIPE.replace("FOLDER", str(Path.cwd())))
    with opening.open_recorder(make_plan(recipe), Display(Console(file=screen, width=300))) as record:
        earlier = record.folder
    earlier.delivery("0-core.mlflow").unlink()  # as if nothing had been delivered

    with opening.open_recorder(make_plan(recipe), Display(Console(file=screen, width=300))):
        pass

    assert not run_status(earlier.path).pending["0-core.mlflow"]
    assert (
        f"sent what the trackers of the earlier run `{earlier.run_id}` had not received" in screen.getvalue()
    )
    assert (
        f"sending what the trackers of the earlier run `{earlier.run_id}` lack "
        "(core.mlflow: 4 journal lines and 2 files)"
    ) in screen.getvalue()


@pytest.mark.parametrize(("host", "status"), [(socket.gethostname(), "KILLED"), ("elsewhere", DIED)])
def test_the_next_run_closes_one_that_died_on_this_machine(dead, host, status, screen):
    folder = RunFolder(path=dead)
    folder.record(host=host)
    facts = json.loads((dead / "run.json").read_text())
    (dead / "run.json").write_text(json.dumps({**facts, "host": host}))

    with opening.open_recorder(make_plan(Path("recipe.toml")), Display(Console(file=screen, width=300))):
        pass

    assert run_status(dead).status == status


def test_a_run_that_died_before_its_first_line_ends_when_it_began(dead):
    RunFolder(path=dead).journal.write_text("")

    sync_run(dead, log=print, limit_s=5)

    run = json.loads((dead / "run.json").read_text())
    assert run["status"] == "KILLED"
    assert run["ended_ms"] == run["started_ms"] > 0


def test_runs_are_found_by_path_id_or_part(dead):
    runs = Path("storage/runs")

    assert find_run(runs, str(dead)) == find_run(runs, dead.name) == find_run(runs, dead.name[-6:]) == dead


def test_a_part_that_fits_several_runs_or_none_is_an_error(dead):
    shutil.copytree(dead, dead.with_name(dead.name + "x"))
    runs = Path("storage/runs")

    with pytest.raises(WmtpError, match="matches 2 runs"):
        find_run(runs, dead.name[:8])
    with pytest.raises(WmtpError, match="there is no run `nowhere`"):
        find_run(runs, "nowhere")
