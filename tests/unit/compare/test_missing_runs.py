"""Missing runs share out cores and GPUs; a failed run stops no other, a lost scheduler ends them all."""

import itertools
import pickle
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from textwrap import dedent

import pytest
from weighted_mtp_core.compare.jobs import Job, plan_jobs
from weighted_mtp_core.compare.runner import Runner, share_machine
from weighted_mtp_core.compare.task import Ended, RunTask, execute, use_gpu
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.executors.address import open_executor


def test_all_arms_come_equally_far(arms):
    jobs = plan_jobs(arms(("one", ""), ("two", "")), [42, 43])

    assert [job.label for job in jobs] == ["one-seed42", "two-seed42", "one-seed43", "two-seed43"]


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    assert share_machine(None, 35) == (8, 1)
    assert share_machine(None, 2) == (2, 4)
    assert share_machine(3, 35) == (3, 2)
    assert share_machine(None, 35, gpus=2) == (2, 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert share_machine(None, 35) == (2, 4)


@pytest.fixture
def run_jobs(tmp_path):
    """Complete jobs with `local:N`; return the outcome and what was logged."""

    def run(jobs, *, at_once, gpus=()):
        said = []
        names = itertools.cycle(gpus)
        plans = [job.arm.plan for job in jobs]
        each = (lambda: use_gpu(next(names))) if gpus else None
        with open_executor(f"local:{at_once}", plans, in_each_thread=each) as executor:
            runner = Runner(
                executor=executor,
                at_once=at_once,
                threads=1,
                logs=tmp_path,
                log=said.append,
                on_done=lambda _: None,
            )
            return runner.run(jobs), said

    return run


def test_runs_share_out_the_gpus(arms, run_jobs, tmp_path, monkeypatch):
    """Each run is a process that prints its GPU; none of them trains."""
    script = (
        "import os, sys, time; print('gpu', os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(1); sys.exit(1)"
    )
    monkeypatch.setattr(Job, "command", lambda _: ["-c", script])

    outcome, _ = run_jobs(plan_jobs(arms(("one", ""), ("two", "")), [1, 2]), at_once=4, gpus=("3", "5"))

    seen = sorted(
        (tmp_path / f"{failure.job.label}.log").read_text().split()[1] for failure in outcome.failures
    )
    assert seen == ["3", "3", "5", "5"]


def test_a_run_that_fails_is_named_with_its_log_and_stops_no_other(
    arms, run_jobs, tmp_path, monkeypatch, finish
):
    script = "print('error: no luck'); raise SystemExit(1)"
    monkeypatch.setattr(Job, "command", lambda _: ["-c", script])
    jobs = plan_jobs(arms(("one", ""), ("two", "")), [1])
    good = finish(jobs[1])

    outcome, said = run_jobs(jobs, at_once=1)

    assert {job.label: path.absolute() for job, path in outcome.finished.items()} == {"two-seed1": good}
    assert [(each.job.label, each.code, each.reason) for each in outcome.failures] == [
        ("one-seed1", 1, "no luck")
    ]
    assert said[-1] == f"one-seed1: FAILED (exit code 1), no luck; log {tmp_path / 'one-seed1.log'}"


class Scheduler(Executor):
    """Ends each task with the next given end: a result, an error or, for None, a cancellation."""

    def __init__(self, *ends):
        self._ends = iter(ends)

    def submit(self, *_):
        future = Future()
        end = next(self._ends)
        if isinstance(end, Ended):
            future.set_result(end)
        elif end is not None:
            future.set_exception(end)
        else:
            future.cancel()
        return future


@pytest.fixture
def run_at(tmp_path):
    """Complete jobs with a scheduler; return the outcome and what was logged."""

    def run(scheduler, jobs):
        said = []
        runner = Runner(
            executor=scheduler,
            at_once=None,
            threads=1,
            logs=tmp_path,
            log=said.append,
            on_done=lambda _: None,
        )
        try:
            return runner.run(jobs), said
        finally:
            assert not list(tmp_path.glob(".order*"))  # deleted, so that all tasks stop

    return run


def test_a_run_that_has_lost_too_many_workers_is_a_run_that_failed(arms, run_at):
    class KilledWorker(Exception):  # noqa: N818 - Dask's name
        pass

    ends = [KilledWorker("Attempted to run it on 4 different workers. See logs."), KilledWorker("Again.")]

    outcome, said = run_at(Scheduler(*ends), plan_jobs(arms(("one", "")), [1, 2]))

    assert [(each.job.label, each.code) for each in outcome.failures] == [("one-seed1", 1), ("one-seed2", 1)]
    assert outcome.failures[0].reason == "KilledWorker: Attempted to run it on 4 different workers"
    assert said[0].startswith("one-seed1: FAILED (exit code 1), KilledWorker: ")


def test_a_run_whose_folder_cannot_be_seen_here_is_a_run_that_failed(arms, run_at, monkeypatch):
    monkeypatch.setattr("weighted_mtp_core.compare.runner._SHARED_S", 0.1)
    elsewhere = Ended(code=0, folder=Path("runs/elsewhere"), reason="", host="node-3")

    outcome, _ = run_at(Scheduler(elsewhere), plan_jobs(arms(("one", "")), [1]))

    (failure,) = outcome.failures
    assert failure.reason == "`runs/elsewhere`, written on node-3, is not in the storage here"


def test_a_lost_scheduler_ends_the_comparison(arms, run_at):
    with pytest.raises(RunFailedError, match="the connection to the scheduler was lost") as error:
        run_at(Scheduler(None, None), plan_jobs(arms(("one", "")), [1, 2]))

    assert error.value.hint == "the same command resumes all runs"


def test_a_worker_that_refuses_a_run_ends_the_comparison(arms, run_at):
    refusal = WmtpError("the worker does not run the code of the client", hint="restart the worker")

    with pytest.raises(WmtpError, match="does not run the code of the client"):
        run_at(Scheduler(refusal, None), plan_jobs(arms(("one", "")), [1, 2]))


def test_a_run_ends_with_the_process_that_started_it(arms, tmp_path):
    """A process executes a task and is killed; the run then gets SIGTERM and reports it."""
    program = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), sys.exit(143)))
        print("began", flush=True)
        time.sleep(60)
    """
    job, log, order = Job(arm=arms(("one", ""))[0], seed=1), tmp_path / "log", tmp_path / "order"
    order.touch()
    command = ["-c", dedent(program)]
    task = RunTask(wanted=job.wanted, command=command, log=log, threads=1, order=order)
    execute = "import pickle, sys; from weighted_mtp_core.compare.task import execute; "
    execute += "execute(pickle.load(sys.stdin.buffer))"
    worker = subprocess.Popen([sys.executable, "-c", execute], stdin=subprocess.PIPE)
    worker.stdin.write(pickle.dumps(task))
    worker.stdin.close()

    wait_until(lambda: log.is_file() and log.read_text() == "began\n")
    worker.kill()
    worker.wait()

    wait_until(lambda: log.read_text() == "began\nstopped\n")


def wait_until(holds, *, seconds=20):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_worker_without_the_clients_storage_refuses_a_run(arms, tmp_path):
    job = Job(arm=arms(("one", ""))[0], seed=1)
    task = RunTask(
        wanted=job.wanted, command=["-c", ""], log=tmp_path / "log", threads=1, order=tmp_path / "order"
    )

    with pytest.raises(WmtpError, match=r"has no file `.*order`, which the client has written") as error:
        execute(task)

    assert error.value.hint.startswith("share the storage with the worker")
