"""The recorder: records are in the run folder first, and the run is closed however it ends."""

import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from textwrap import dedent

import pytest
from weighted_mtp_core.api import DatasetVersion, RunOutcome, WmtpError
from weighted_mtp_core.errors import RunFailedError, Terminated
from weighted_mtp_core.storage.atomic import atomic_file
from weighted_mtp_core.tracking import run_folder
from weighted_mtp_core.tracking.journal import read_journal
from weighted_mtp_core.tracking.run_folder import RunFolder, read_run


def entries(folder, kind):
    return [entry.fields for entry in read_journal(folder.journal) if entry.kind == kind]


def test_a_finished_run_is_the_same_in_folder_and_tracker(open_recorder, folder, notebook):
    with open_recorder(notebook=notebook) as record:
        record.metrics("critic", 1, {"value_loss": 0.5})
        record.timings("critic", 1, {"critic_tokens_per_second": 9.0})

    assert entries(folder, "metrics") == [{"step": 1, "stage": "critic", "metrics": {"value_loss": 0.5}}]
    assert notebook.points() == [("value_loss", 1, 0.5), ("critic_tokens_per_second", 1, 9.0)]
    assert notebook.all("artifact") == ["/recipe.toml", "logs/training.log"]
    assert notebook.all("finish") == [RunOutcome.FINISHED]
    assert read_run(folder.path)["status"] == "FINISHED"


def test_every_tracker_gets_the_run(open_recorder, notebook):
    second = type(notebook)()

    with open_recorder(first=notebook, second=second) as record:
        record.metrics("policy", 1, {"policy_loss": 0.5})

    assert notebook.points() == second.points() == [("policy_loss", 1, 0.5)]


def test_wall_clock_measurements_are_lines_of_another_kind(open_recorder, folder):
    with open_recorder() as record:
        record.timings("policy", 1, {"tokens": 5.0})

    assert entries(folder, "metrics") == []
    assert entries(folder, "timings") == [{"step": 1, "stage": "policy", "metrics": {"tokens": 5.0}}]


def test_data_become_dataset_inputs_and_params(open_recorder, notebook):
    with open_recorder(notebook=notebook) as record:
        record.datasets([DatasetVersion(name="d", version="2", sha256="f" * 64)])

    last = notebook.all("start")[-1]
    assert last.datasets == (DatasetVersion(name="d", version="2", sha256="f" * 64),)
    assert last.params["data.version"] == "2"
    assert last.params["data.sha256"] == "f" * 64


def test_a_value_that_is_not_finite_is_said_once_and_kept_in_the_journal(
    open_recorder, folder, notebook, screen
):
    with open_recorder(notebook=notebook) as record:
        record.metrics("policy", 1, {"policy_loss": float("nan")})
        record.metrics("policy", 2, {"policy_loss": float("inf")})

    assert [line["metrics"]["policy_loss"] for line in entries(folder, "metrics")] == ["nan", "inf"]
    assert notebook.points() == []
    assert screen.getvalue().count("`policy_loss` is nan at step 1") == 1
    assert "is inf" not in screen.getvalue()


def test_a_metric_comes_once_a_step(open_recorder):
    record = open_recorder()
    record.metrics("policy", 5, {"policy_loss": 1.0})

    with pytest.raises(RunFailedError, match="`policy_loss` was recorded for step 5 of stage `policy` after"):
        record.metrics("policy", 5, {"policy_loss": 1.0})

    record.finish(RunOutcome.FAILED)


@pytest.mark.parametrize("name", ["", "a\0b", "loss[0]", "../x", "a//b", "x" * 251])
def test_names_that_a_tracker_cannot_hold_are_refused(open_recorder, name):
    record = open_recorder()

    with pytest.raises(WmtpError, match="is not a valid name for a metric"):
        record.metrics("policy", 1, {name: 1.0})

    record.finish(RunOutcome.FAILED)


@pytest.mark.parametrize("name", ["value_loss", "a/b.c", "pass@1".replace("@", "_at_"), "head 1:ce"])
def test_usual_names_are_taken(open_recorder, folder, name):
    with open_recorder() as record:
        record.metrics("policy", 1, {name: 1.0})

    assert list(entries(folder, "metrics")[0]["metrics"]) == [name]


def test_the_log_holds_what_was_said_logged_and_warned(open_recorder, folder, screen):
    with open_recorder() as record:
        record.log("critic informative")
        logging.getLogger("weighted_mtp_core.data").info("12 examples left out")
        warnings.warn("old format", stacklevel=1)

    log = folder.log.read_text()
    assert "critic informative" in log
    assert "12 examples left out" in log
    assert "old format" in log
    assert "critic informative" in screen.getvalue()


def test_after_the_run_the_log_is_left_alone(open_recorder, folder):
    with open_recorder():
        pass
    before = folder.log.read_text()

    logging.getLogger("weighted_mtp_core").info("another run")

    assert folder.log.read_text() == before


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [
        (ValueError("bad"), RunOutcome.FAILED),
        (SystemExit(0), RunOutcome.FINISHED),
        (SystemExit(None), RunOutcome.FINISHED),
        (SystemExit(3), RunOutcome.FAILED),
        (SystemExit("no"), RunOutcome.FAILED),
        (KeyboardInterrupt(), RunOutcome.KILLED),
    ],
)
def test_the_way_out_decides_the_status(open_recorder, folder, notebook, raised, outcome):
    with pytest.raises(type(raised)), open_recorder(notebook=notebook):
        raise raised

    assert notebook.all("finish") == [outcome]
    assert read_run(folder.path)["status"] == outcome.value


class SigtermError(RuntimeError):
    """Sends SIGTERM to this process while its message is formatted for the first time."""

    sent = False

    def __str__(self):
        if not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return "the connection is lost"


def test_sigterm_while_a_failure_is_written_leaves_the_run_failed(open_recorder, folder):
    with pytest.raises(Terminated), open_recorder():
        raise SigtermError

    assert read_run(folder.path)["status"] == "FAILED"
    assert "the connection is lost" in folder.log.read_text()


def test_sigterm_while_the_end_is_recorded_leaves_the_run_failed(open_recorder, folder, monkeypatch):
    def interrupted(path, data):
        with atomic_file(path) as unfinished:
            unfinished.write_text(data)
            if '"FAILED"' in data:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_folder, "atomic_write", interrupted)
    with pytest.raises(Terminated), open_recorder():
        raise RuntimeError

    assert read_run(folder.path)["status"] == "FAILED"


def test_a_failure_leaves_its_class_as_a_tag_and_its_traceback_without_secrets_in_the_log(
    open_recorder, folder, notebook, monkeypatch
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    with pytest.raises(RuntimeError), open_recorder(notebook=notebook):
        raise RuntimeError("upload to https://ann:pw@host failed with planted-secret")

    assert {"wmtp.error_class": "RuntimeError"} in notebook.all("tags")
    assert "RuntimeError: upload to https://***@host failed with ***" in folder.log.read_text()


def test_secrets_in_tags_and_params_are_taken_out(open_recorder, folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-secret")
    with open_recorder() as record:
        record.tags({"git": "https://user:token@git.example.org/r.git", "note": "planted-secret"})

    assert entries(folder, "tags")[-1]["tags"] == {"git": "https://***@git.example.org/r.git", "note": "***"}


def test_a_tracker_that_refuses_the_run_fails_it_everywhere(open_recorder, folder, notebook):
    refusing = type(notebook)()
    refusing.refuses = "start"

    with pytest.raises(WmtpError, match="no start here"):
        open_recorder(first=notebook, second=refusing)

    assert notebook.all("finish") == [RunOutcome.FAILED]
    assert read_run(folder.path)["status"] == "FAILED"
    RunFolder.open(folder.path).close()


def test_the_end_says_what_a_tracker_did_not_get(open_recorder, folder, notebook, screen):
    record = open_recorder(close_seconds=2, notebook=notebook)
    notebook.away = True
    record.metrics("policy", 1, {"policy_loss": 1.0})

    record.finish(RunOutcome.FINISHED)

    last = screen.getvalue().splitlines()[-1]
    assert last.startswith("`notebook` has not received ")
    assert "(nobody there)" in last
    assert str(folder.path) in last


def test_closing_twice_closes_once(open_recorder, notebook):
    record = open_recorder(notebook=notebook)

    record.finish(RunOutcome.FINISHED)
    record.finish(RunOutcome.FAILED)

    assert notebook.all("finish") == [RunOutcome.FINISHED]


def test_a_report_is_a_file_that_trackers_get(open_recorder, folder, notebook):
    with open_recorder(notebook=notebook) as record:
        record.report([("critic", "AUC 0.7"), ("policy", "held-out loss 5 -> 4")])

    assert (folder.path / "report.md").read_text() == (
        "- **critic**: AUC 0.7\n- **policy**: held-out loss 5 -> 4\n"
    )
    assert "/report.md" in notebook.all("artifact")


def test_a_delivery_must_hand_the_interpreter_back_quickly_while_a_run_goes_on(open_recorder, notebook):
    usual = sys.getswitchinterval()
    with open_recorder(notebook=notebook):
        during = sys.getswitchinterval()

    assert during < 0.001
    assert sys.getswitchinterval() == usual


def test_trackers_say_where_the_run_is(open_recorder, notebook):
    with open_recorder(notebook=notebook) as record:
        where = record.where()

    assert where == ["look at the notebook"]


KILLED = """
    import io, sys, time
    from pathlib import Path
    from weighted_mtp_core.api import RunInfo
    from weighted_mtp_core.tracking.display import Display
    from weighted_mtp_core.tracking.recorder import Recorder
    from weighted_mtp_core.tracking.run_folder import RunFolder

    folder = RunFolder.create(Path(sys.argv[1]), experiment="x", name="y")
    info = RunInfo(
        run_id=folder.run_id, name="y", experiment="x", params={}, tags={}, datasets=(), folder=folder.path
    )
    with Recorder.open(folder, info, trackers={}, recipe_toml="", display=Display()):
        print(folder.path, flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_as_killed(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", dedent(KILLED), tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = process.stdout.readline().strip()

    os.kill(process.pid, number)
    process.communicate(timeout=20)

    assert json.loads((tmp_path / folder / "run.json").read_text())["status"] == "KILLED"
