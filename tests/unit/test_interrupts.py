"""Signals: remembered, held back or raised, from the first line of a process to the last."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from rich.console import Console
from weighted_mtp_core.api import Tracker
from weighted_mtp_core.checkpointing.resume import run_to_resume
from weighted_mtp_core.errors import Terminated
from weighted_mtp_core.plan import make_plan
from weighted_mtp_core.runtime.interrupts import StopRequest, hold_signals, raise_on_termination
from weighted_mtp_core.tracking import opening
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.tracking.run_folder import find_runs
from weighted_mtp_core.tracking.sync import DIED, run_status, sync_run

RECIPE = """
    [run]
    name = "tried"
    resume = "auto"
    [data]
    use = "example"
    options = { folder = "f" }
    [weighting]
    use = "example.flat"
"""
ENDING = [
    (signal.SIGINT, KeyboardInterrupt),
    (signal.SIGTERM, Terminated),
    (signal.SIGHUP, Terminated),
]


def kill_myself(number):
    os.kill(os.getpid(), number)


def held(*steps):
    with hold_signals():
        for step in steps:
            step()


@pytest.fixture(autouse=True)
def _handlers_of_a_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
    StopRequest().forget_checkpoint_request()


@pytest.mark.parametrize(("number", "raised"), ENDING)
def test_a_signal_waits_for_the_end_of_the_block(number, raised):
    reached = []

    with pytest.raises(raised) as caught:
        held(lambda: kill_myself(number), lambda: reached.append(True))

    assert reached
    assert type(caught.value) is raised


def test_a_second_signal_does_not_wait():
    reached = []

    with pytest.raises(Terminated):
        held(*[lambda: kill_myself(signal.SIGTERM)] * 2, lambda: reached.append(True))

    assert not reached


@pytest.mark.parametrize(("number", "raised"), ENDING)
def test_a_signal_in_training_only_requests_a_stop(number, raised):
    with StopRequest() as stop:
        kill_myself(number)
        assert stop.requested
        with pytest.raises(raised):
            stop.stop()


def test_sigusr1_is_remembered_until_a_checkpoint_is_taken():
    with raise_on_termination():
        kill_myself(signal.SIGUSR1)
    with StopRequest() as first:
        remembered = first.checkpoint_requested
        first.forget_checkpoint_request()
    with StopRequest() as second:
        assert not second.checkpoint_requested

    assert remembered


def test_nohup_keeps_a_run_from_ending_with_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with raise_on_termination(), hold_signals(), StopRequest() as stop:
        kill_myself(signal.SIGHUP)

        assert not stop.requested


class Interrupting(Tracker):
    """Sends a signal to this process while the run is opened."""

    def __init__(self, number):
        self.number = number

    def start(self, run):
        kill_myself(self.number)

    def log_metrics(self, points):
        pass

    def log_artifact(self, path, subdir):
        pass

    def set_tags(self, tags):
        pass

    def finish(self, outcome, *, time_ms=None):
        pass

    def where(self):
        return ""


@pytest.mark.parametrize(("number", "raised"), ENDING)
def test_a_signal_while_a_run_is_opened_closes_it(number, raised, write_recipe, example_plugin, monkeypatch):
    monkeypatch.setattr(opening, "build_trackers", lambda _: {"0-interrupting": Interrupting(number)})
    plan = make_plan(write_recipe(RECIPE))

    with (
        pytest.raises(raised),
        raise_on_termination(),
        opening.open_recorder(plan, Display(Console(quiet=True))),
    ):
        pytest.fail("the run went on")

    (path,) = find_runs(plan.runs_folder)
    assert run_status(path).status == "KILLED"


KILLED_WHILE_OPENING = """
    import os, signal
    from pathlib import Path
    from weighted_mtp_core.plan import make_plan
    from weighted_mtp_core.tracking import opening, recorder
    from weighted_mtp_core.tracking.display import Display

    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    {name} = kill
    opening.open_recorder(make_plan(Path("recipe.toml")), Display())
"""


@pytest.mark.parametrize(
    "name", ["opening.RunInfo", "recorder.Journal", "recorder.RunHistory", "recorder.start_backfill"]
)
def test_a_run_that_is_killed_while_it_is_opened_goes_on(name, write_recipe, example_plugin, site):
    plan = make_plan(write_recipe(RECIPE))
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    code = dedent(KILLED_WHILE_OPENING.format(name=name))
    process = subprocess.run([sys.executable, "-c", code], env=environment, check=False)

    assert process.returncode == -signal.SIGKILL
    (killed,) = find_runs(plan.runs_folder)
    assert run_to_resume(plan, None) == killed.absolute()
    with opening.open_recorder(plan, Display(Console(quiet=True)), resume=killed):
        pass
    assert run_status(killed).status == "FINISHED"
    assert list(find_runs(plan.runs_folder)) == [killed]
    assert len(list(Path(killed).parent.iterdir())) == 1


KILLED_WHILE_SENDING = """
    from pathlib import Path
    from weighted_mtp_core.plan import make_plan
    from weighted_mtp_core.tracking.display import Display
    from weighted_mtp_core.tracking.opening import open_recorder
    from weighted_mtp_core.tracking.recorder import Recorder

    with open_recorder(make_plan(Path("recipe.toml")), Display()):
        Recorder._send_the_rest = lambda _: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_is_killed_while_it_sends_its_last_records_goes_on(write_recipe, example_plugin, site):
    plan = make_plan(write_recipe(RECIPE))
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    code = "import os, signal\n" + dedent(KILLED_WHILE_SENDING)
    process = subprocess.run([sys.executable, "-c", code], env=environment, check=False)

    assert process.returncode == -signal.SIGKILL
    (killed,) = find_runs(plan.runs_folder)
    assert run_status(killed).status == DIED
    assert run_to_resume(plan, None) == killed.absolute()
    sync_run(killed, log=print, limit_s=1)
    assert run_status(killed).status == "FINISHED"
    assert run_to_resume(plan, None) is None


@pytest.mark.parametrize("arguments", [["plugins", "list"], ["check", "recipe.toml"]])
def test_no_command_ends_with_sigusr1(arguments, write_recipe, example_plugin, site):
    write_recipe(RECIPE)
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    code = dedent("""
        import runpy, signal, sys
        import weighted_mtp_core.cli as cli
        def main(arguments, main=cli.main):
            signal.raise_signal(signal.SIGUSR1)
            code = main(arguments)
            signal.raise_signal(signal.SIGUSR1)
            return code
        cli.main = main
        runpy.run_module("weighted_mtp_core", run_name="__main__", alter_sys=True)
    """)

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
