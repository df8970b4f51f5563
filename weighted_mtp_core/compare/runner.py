"""Execute the unfinished runs of a comparison, each as a task of an executor.

Finished runs are found by their recipe, so the same command continues an interrupted comparison.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from pathlib import Path

from attrs import define, field, frozen

from weighted_mtp_core.compare.arms import Arm
from weighted_mtp_core.compare.jobs import Job
from weighted_mtp_core.compare.task import KILL, STOP_LIMIT_S, Ended, RunTask, execute
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.exit_codes import EXIT_RUN_FAILED
from weighted_mtp_core.runtime.interrupts import raise_on_termination

MOST_SEEDS = 20
"""Maximum number N of seeds: the exact test computes all 2^N choices of signs, a million for 20 seeds."""

_POLL_S = 0.2
_SHARED_S = 60.0
"""Maximum seconds until a network file system shows a file that another machine has written."""


@frozen(kw_only=True)
class Failure:
    """A run that did not finish.

    Attributes:
        job: The job.
        code: Exit code of the job's process; 0 if the process ended well, but its run folder was not found;
            `EXIT_RUN_FAILED` if the executor lost the task.
        reason: Why the run did not finish; usually the last `error:` line of the job's output.
        log: File with the job's output.
    """

    job: Job
    code: int
    reason: str
    log: Path


@frozen(kw_only=True)
class Outcome:
    """The result of a runner: the run folders of finished jobs, and the failures of the other jobs."""

    finished: Mapping[Job, Path]
    failures: Sequence[Failure]


def visible_gpus(arms: Sequence[Arm]) -> list[str]:
    """Return the names of the available GPUs for CUDA_VISIBLE_DEVICES.

    The list is empty if there is no GPU, or if all arms use `cpu`.
    """
    if all(arm.plan.recipe.model.device == "cpu" for arm in arms):
        return []
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return (given.split(",") if given else [str(number) for number in range(count)])[:count]


def share_machine(slots: int | None, runs: int, *, gpus: int = 0) -> tuple[int, int]:
    """Return how many runs are executed at once, and the number of threads of each run.

    Without `slots`, one run is executed per GPU or, without GPUs, per core, but not more than `runs`. If
    OMP_NUM_THREADS is set, it is the number of threads of each run; without `slots` and GPUs, each run then
    takes this number of cores. `runs` includes finished runs, so that both numbers stay the same when a
    comparison is continued: the number of threads affects the last digits of a run's results.
    """
    cores = len(os.sched_getaffinity(0))
    threads = given_threads() or 0
    at_once = slots or max(1, min(gpus or cores // max(threads, 1), runs))
    return at_once, threads or max(1, cores // at_once)


def given_threads() -> int | None:
    """Return OMP_NUM_THREADS if it is set to a number above 0, otherwise None."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else None


@define(kw_only=True, eq=False)
class Runner:
    """Executes jobs, several at once.

    Attributes:
        executor: Executes the tasks.
        at_once: Maximum number of tasks that the executor holds; None for an executor that gets all tasks and
            distributes them itself.
        threads: Number of threads of each job.
        logs: Folder for the output of the jobs.
        log: Called with messages for the user, for example when a job begins or fails.
        on_done: Called after each job with the number of jobs that have finished or failed.
    """

    executor: Executor
    at_once: int | None
    threads: int
    logs: Path
    log: Callable[[str], None]
    on_done: Callable[[int], None]
    _order: Path = field(init=False)
    _finished: dict[Job, Path] = field(init=False, factory=dict)
    _failures: list[Failure] = field(init=False, factory=list)
    _futures: dict[Job, Future[Ended]] = field(init=False, factory=dict)

    def run(self, jobs: Sequence[Job]) -> Outcome:
        """Complete every job; the failure of a job does not stop the other jobs.

        Raises:
            WmtpError: A worker cannot execute runs of this comparison, or must not receive a secret that they
                contain.
            RunFailedError: The connection to the scheduler was lost.
            KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP was received; jobs that had begun are stopped, with a
                checkpoint unless this takes too long.
        """
        waiting = []
        for job in jobs:
            found = job.wanted.finished()
            if found is None:
                waiting.append(job)
            else:
                self._end(job, found)
        elsewhere: set[Job] = set()
        self.logs.mkdir(parents=True, exist_ok=True)
        self._order = self.logs / f".order-{secrets.token_hex(8)}"
        self._order.touch()
        with raise_on_termination():
            try:
                while waiting or self._futures:
                    self._begin(waiting, elsewhere)
                    self._collect()
                    time.sleep(_POLL_S)
            except BaseException:
                self._stop(len(jobs))
                raise
            finally:
                self._order.unlink(missing_ok=True)
        return Outcome(finished=self._finished, failures=self._failures)

    def _begin(self, waiting: list[Job], elsewhere: set[Job]) -> None:
        """Start jobs up to the limit, except those that another process executes."""
        for job in tuple(waiting):
            if self.at_once is not None and len(self._futures) >= self.at_once:
                return
            wanted = job.wanted
            if wanted.is_running():
                if job not in elsewhere:
                    elsewhere.add(job)
                    self.log(f"{job.label}: another process executes it; waiting for that process")
                continue
            waiting.remove(job)
            found = wanted.finished() if job in elsewhere else None
            if found is None:
                self._start(job)
            else:
                self._end(job, found)

    def _start(self, job: Job) -> None:
        if self.at_once is not None:  # otherwise the scheduler decides when the job begins
            self.log(f"{job.label}: begins, log {self._log(job)}")
        task = RunTask(
            wanted=job.wanted,
            command=job.command(),
            log=self._log(job),
            threads=self.threads,
            order=self._order,
        )
        self._futures[job] = self.executor.submit(execute, task)

    def _collect(self) -> None:
        for job, future in tuple(self._futures.items()):
            if not future.done():
                continue
            del self._futures[job]
            if future.cancelled():
                raise RunFailedError(
                    "the connection to the scheduler was lost", hint="the same command resumes all runs"
                )
            error = future.exception()
            if isinstance(error, WmtpError):
                raise error
            if error is not None:  # Dask gives up on a task that has lost several workers
                self._fail(job, EXIT_RUN_FAILED, f"{type(error).__name__}: {error}".partition(". ")[0])
                continue
            ended = future.result()
            if ended.folder is None:
                self._fail(job, ended.code, ended.reason)
            elif self._sees(job, ended.folder):
                self._end(job, ended.folder)
                if self.at_once is None:
                    self.log(f"{job.label}: finished on {ended.host}")
            else:
                self._fail(job, 0, f"`{ended.folder}`, written on {ended.host}, is not in the storage here")

    def _sees(self, job: Job, folder: Path) -> bool:
        until, wanted = time.monotonic() + _SHARED_S, job.wanted
        while not (found := wanted.is_finished(folder)) and time.monotonic() < until:
            time.sleep(_POLL_S)
        return found

    def _end(self, job: Job, folder: Path) -> None:
        self._finished[job] = folder
        self.on_done(len(self._finished) + len(self._failures))

    def _fail(self, job: Job, code: int, why: str) -> None:
        self._failures.append(Failure(job=job, code=code, reason=why, log=self._log(job)))
        self.log(f"{job.label}: FAILED (exit code {code}), {why}; log {self._log(job)}")
        self.on_done(len(self._finished) + len(self._failures))

    def _stop(self, total: int) -> None:
        """Stop all runs and wait at most `STOP_LIMIT_S` seconds; a second interrupt kills their processes."""
        self._order.write_text("stop", encoding="utf-8")
        for future in self._futures.values():
            future.cancel()
        running = [future for future in self._futures.values() if not future.done()]
        self.log(f"{len(self._finished)} of {total} runs are finished")
        if self._futures:
            self.log(f"stopping {len(self._futures)} runs; the same command resumes them")
        try:
            wait(running, timeout=STOP_LIMIT_S)
        except KeyboardInterrupt:
            self._order.write_text(KILL, encoding="utf-8")
            wait(running)

    def _log(self, job: Job) -> Path:
        return self.logs / f"{job.label}.log"
