"""Execute the unfinished runs of a comparison, each in its own process.

Finished runs are found by their recipe, so the same command continues an interrupted comparison.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from attrs import define, field, frozen

from weighted_mtp_core.compare.arms import Arm, is_below
from weighted_mtp_core.runtime.interrupts import raise_on_termination
from weighted_mtp_core.tracking.run_folder import is_held, read_run

_SAME_RESULT = ("checkpoint", "run.resume", "run.tags", "tracker")
"""Keys that do not affect the results of a run, in addition to `Plan.same_result`."""

MOST_SEEDS = 20
"""Maximum number N of seeds: the exact test computes all 2^N choices of signs, a million for 20 seeds."""

_POLL_S = 0.2
_STOP_LIMIT_S = 60.0  # after SIGTERM a child needs time to end its step and write a checkpoint


@frozen(kw_only=True)
class Job:
    """One run of a comparison."""

    arm: Arm
    seed: int

    @property
    def label(self) -> str:
        """The name of the job in messages and of its log file."""
        return f"{self.arm.name}-seed{self.seed}"

    def command(self) -> list[str]:
        """Return the command that executes or resumes the run."""
        preset = ["--preset", self.arm.preset] if self.arm.preset else []
        changes = [*self.arm.overrides, f"run.seed={self.seed}"]
        sets = [part for change in changes for part in ("--set", change)]
        return [sys.executable, "-m", "weighted_mtp_core", "run", str(self.arm.recipe), *preset, *sets]


@frozen(kw_only=True)
class Failure:
    """A run that did not finish.

    Attributes:
        job: The job.
        code: Exit code of the job's process.
        reason: Last `error:` line of the job's output.
        log: File with the job's output.
    """

    job: Job
    code: int
    reason: str
    log: Path


@frozen(kw_only=True)
class Outcome:
    """The result of the jobs: the run folders of finished jobs, and the failures of the others."""

    finished: Mapping[Job, Path]
    failures: Sequence[Failure]


def plan_jobs(arms: Sequence[Arm], seeds: Sequence[int]) -> list[Job]:
    """Return all jobs ordered by seed, so that all arms progress equally."""
    return [Job(arm=arm, seed=seed) for seed in seeds for arm in arms]


def visible_gpus(arms: Sequence[Arm]) -> list[str]:
    """Return the names of the available GPUs for CUDA_VISIBLE_DEVICES; empty if all arms use `cpu`."""
    if all(arm.plan.recipe.model.device == "cpu" for arm in arms):
        return []
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return (given.split(",") if given else [str(number) for number in range(count)])[:count]


def share_machine(jobs: int | None, runs: int, *, gpus: int = 0) -> tuple[int, int]:
    """Return how many runs are executed at once, and the number of threads of each run.

    There is one run per GPU or, without GPUs, one per core. OMP_NUM_THREADS takes precedence. Neither number
    depends on the runs that are already finished, because the number of threads affects the last digits of a
    run's results.
    """
    cores = len(os.sched_getaffinity(0))
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() and int(given) else 0
    at_once = jobs or max(1, min(gpus or cores // max(threads, 1), runs))
    return at_once, threads or max(1, cores // at_once)


def find_finished(job: Job) -> Path | None:
    """Return the latest finished run with the job's recipe, source code and seed."""
    return next((path for path in _runs_of(job) if read_run(path).get("status") == "FINISHED"), None)


def _is_running(job: Job) -> bool:
    """Return whether a process of another comparison, or of a killed comparison, already executes the job."""
    return any(read_run(path).get("status") == "RUNNING" and is_held(path) for path in _runs_of(job))


def _runs_of(job: Job) -> Iterator[Path]:
    plan = job.arm.plan
    folder = plan.runs_folder / plan.experiment / job.arm.name
    same_result = (*_SAME_RESULT, *plan.same_result)
    wanted = _comparable(job.arm.identity(job.seed), same_result)
    for file in sorted(folder.glob("[!.]*/run.json"), reverse=True):
        if _comparable(read_run(file.parent), same_result) == wanted:
            yield file.parent


def _comparable(
    facts: Mapping[str, Mapping[str, str]], same_result: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    params = {key: value for key, value in facts.get("params", {}).items() if not is_below(key, same_result)}
    return params, dict(facts.get("distributions", {}))


@define(kw_only=True, eq=False)
class Runner:
    """Executes jobs, several at once.

    Attributes:
        at_once: How many jobs run at once.
        threads: Number of threads of each job.
        gpus: Names of the GPUs that the jobs share; may be empty.
        logs: Folder for the output of the jobs.
        log: Called with a line when a job begins or fails.
        on_done: Called with the number of completed jobs after each job.
    """

    at_once: int
    threads: int
    gpus: Sequence[str] = ()
    logs: Path
    log: Callable[[str], None]
    on_done: Callable[[int], None]
    _finished: dict[Job, Path] = field(init=False, factory=dict)
    _failures: list[Failure] = field(init=False, factory=list)
    _gpus_taken: dict[Job, str] = field(init=False, factory=dict)
    _children: dict[Job, subprocess.Popen[bytes]] = field(init=False, factory=dict)

    def run(self, jobs: Sequence[Job]) -> Outcome:
        """Complete every job; the failure of a job does not stop the other jobs.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM was received, and all jobs have stopped with a checkpoint.
        """
        waiting = []
        for job in jobs:
            found = find_finished(job)
            if found is None:
                waiting.append(job)
            else:
                self._end(job, found)
        elsewhere: set[Job] = set()
        self.logs.mkdir(parents=True, exist_ok=True)
        with raise_on_termination():
            try:
                while waiting or self._children:
                    self._begin(waiting, elsewhere)
                    self._collect()
                    time.sleep(_POLL_S)
            except BaseException:
                self._stop()
                raise
        return Outcome(finished=self._finished, failures=self._failures)

    def _begin(self, waiting: list[Job], elsewhere: set[Job]) -> None:
        """Start jobs up to the limit, except those that another process executes."""
        for job in tuple(waiting):
            if len(self._children) >= self.at_once:
                return
            if _is_running(job):
                if job not in elsewhere:
                    elsewhere.add(job)
                    self.log(f"{job.label}: another process executes it; waiting for that process")
                continue
            waiting.remove(job)
            found = find_finished(job) if job in elsewhere else None
            if found is None:
                self._start(job)
            else:
                self._end(job, found)

    def _start(self, job: Job) -> None:
        self.log(f"{job.label}: begins, log {self._log(job)}")
        with self._log(job).open("wb") as log:
            self._children[job] = subprocess.Popen(
                job.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads), **self._gpu_of(job)},
                start_new_session=True,  # so that a child receives Ctrl-C only from this process
            )

    def _gpu_of(self, job: Job) -> dict[str, str]:
        """Assign the GPU with the fewest other runs."""
        if not self.gpus:
            return {}
        taken = [self._gpus_taken[each] for each in self._children]
        self._gpus_taken[job] = min(self.gpus, key=taken.count)
        return {"CUDA_VISIBLE_DEVICES": self._gpus_taken[job]}

    def _collect(self) -> None:
        for job, child in tuple(self._children.items()):
            if child.poll() is None:
                continue
            del self._children[job]
            found = find_finished(job) if child.returncode == 0 else None
            if found is not None:
                self._end(job, found)
            else:
                self._fail(job, child.returncode)

    def _end(self, job: Job, folder: Path) -> None:
        self._finished[job] = folder
        self.on_done(len(self._finished) + len(self._failures))

    def _fail(self, job: Job, code: int) -> None:
        # exit code 0: the recorded run differs from the job that this process planned
        reason = _last_error(self._log(job)) if code else "its recipe or the source of a plugin was edited"
        self._failures.append(Failure(job=job, code=code, reason=reason, log=self._log(job)))
        self.log(f"{job.label}: FAILED (exit code {code}), {reason}; log {self._log(job)}")
        self.on_done(len(self._finished) + len(self._failures))

    def _stop(self) -> None:
        """Stop all child processes and wait until they end; a second interrupt kills them."""
        for child in self._children.values():
            child.terminate()  # SIGTERM, because a child of a background job ignores SIGINT
        if self._children:
            self.log(f"stopping {len(self._children)} runs; the same command resumes them")
        until = time.monotonic() + _STOP_LIMIT_S
        try:
            for child in self._children.values():
                child.wait(timeout=max(0.0, until - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for child in self._children.values():
                child.kill()
                child.wait()

    def _log(self, job: Job) -> Path:
        return self.logs / f"{job.label}.log"


def _last_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ")
