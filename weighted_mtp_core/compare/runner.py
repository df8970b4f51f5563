"""Every run that a comparison needs: found if it is finished, else carried out in a process of its own.

What is finished is found by its recipe, so a comparison that was stopped goes on when it is called again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from attrs import define, field, frozen

from weighted_mtp_core.compare.arms import Arm
from weighted_mtp_core.errors import Terminated
from weighted_mtp_core.tracking.run_folder import is_held, read_run

_SAME_RESULT = ("checkpoint", "run.resume", "run.tags", "tracker")
"""Keys that may differ in the same run, beside `Plan.same_result`: its numbers do not depend on them."""

MOST_SEEDS = 20
"""With more, the exact test would go through more than a million signs."""

_POLL_S = 0.2
_PATIENCE_S = 60.0  # a child that was asked to stop ends its step and writes a checkpoint


@frozen(kw_only=True)
class Job:
    """One run of a comparison."""

    arm: Arm
    seed: int

    @property
    def label(self) -> str:
        """What messages and logs call it."""
        return f"{self.arm.name}-seed{self.seed}"

    def command(self) -> list[str]:
        """Return the command that carries it out, or goes on with it."""
        preset = ["--preset", self.arm.preset] if self.arm.preset else []
        changes = [*self.arm.overrides, f"run.seed={self.seed}"]
        sets = [part for change in changes for part in ("--set", change)]
        return [sys.executable, "-m", "weighted_mtp_core", "run", str(self.arm.recipe), *preset, *sets]


@frozen(kw_only=True)
class Failure:
    """A run that did not finish.

    Attributes:
        job: Which.
        code: The exit code of its process.
        reason: The last `error:` line it wrote.
        log: All that it wrote.
    """

    job: Job
    code: int
    reason: str
    log: Path


@frozen(kw_only=True)
class Outcome:
    """What became of the jobs: the folders of the finished ones, and the failures."""

    finished: Mapping[Job, Path]
    failures: Sequence[Failure]


def plan_jobs(arms: Sequence[Arm], seeds: Sequence[int]) -> list[Job]:
    """Return every run, seed by seed, so that all arms come equally far."""
    return [Job(arm=arm, seed=seed) for seed in seeds for arm in arms]


def visible_gpus(arms: Sequence[Arm]) -> list[str]:
    """Return the GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them; none if all arms say `cpu`."""
    if all(arm.plan.recipe.model.device == "cpu" for arm in arms):
        return []
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return (given.split(",") if given else [str(number) for number in range(count)])[:count]


def share_machine(jobs: int | None, runs: int, *, gpus: int = 0) -> tuple[int, int]:
    """Return how many runs go on at once, and how many threads each has.

    One a GPU if there are any, else one a core. OMP_NUM_THREADS of the environment wins. Neither number
    depends on what is finished already: with other threads a run has other last digits.
    """
    cores = len(os.sched_getaffinity(0))
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() and int(given) else 0
    at_once = jobs or max(1, min(gpus or cores // max(threads, 1), runs))
    return at_once, threads or max(1, cores // at_once)


def find_finished(job: Job) -> Path | None:
    """Return the latest finished run with the job's recipe, plugins and seed."""
    return next((path for path in _runs_of(job) if read_run(path).get("status") == "FINISHED"), None)


def _is_going_on(job: Job) -> bool:
    """Tell whether some process carries out the job: one of another comparison, or of one that was killed."""
    return any(read_run(path).get("status") == "RUNNING" and is_held(path) for path in _runs_of(job))


def _runs_of(job: Job) -> Iterator[Path]:
    plan = job.arm.plan
    folder = plan.runs_folder / plan.experiment / job.arm.name
    same_result = (*_SAME_RESULT, *plan.same_result)
    wanted = _comparable(job.arm.identity(job.seed), same_result)
    for file in sorted(folder.glob("*/run.json"), reverse=True):
        if _comparable(read_run(file.parent), same_result) == wanted:
            yield file.parent


def _comparable(
    facts: Mapping[str, Mapping[str, str]], same_result: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    def matters(key: str) -> bool:
        return not any(key == each or key.startswith(f"{each}.") for each in same_result)

    params = {key: value for key, value in facts.get("params", {}).items() if matters(key)}
    return params, dict(facts.get("plugins", {}))


@define(kw_only=True, eq=False)
class Runner:
    """Carries out jobs, several at once.

    Attributes:
        at_once: How many.
        threads: Of each.
        gpus: Names of GPUs, which runs take in turn; may be empty.
        logs: Where the output of each goes.
        log: Tells the person; called when a job begins, ends or fails.
        moved: Told how many jobs are done whenever one more is.
    """

    at_once: int
    threads: int
    gpus: Sequence[str] = ()
    logs: Path
    log: Callable[[str], None]
    moved: Callable[[int], None]
    _finished: dict[Job, Path] = field(init=False, factory=dict)
    _failures: list[Failure] = field(init=False, factory=list)
    _gpus_taken: dict[Job, str] = field(init=False, factory=dict)
    _children: dict[Job, subprocess.Popen[bytes]] = field(init=False, factory=dict)

    def run(self, jobs: Sequence[Job]) -> Outcome:
        """Bring every job to its end; one that fails stops no other.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM asked for the end; the children stopped with a checkpoint.
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
        with _terminable():
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
        """Start jobs while there is room; those that others carry out are looked at again later."""
        for job in tuple(waiting):
            if len(self._children) >= self.at_once:
                return
            if _is_going_on(job):
                if job not in elsewhere:
                    elsewhere.add(job)
                    self.log(f"{job.label}: another process is at it; waiting for that")
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
                start_new_session=True,  # Ctrl-C reaches a child once, from here
            )

    def _gpu_of(self, job: Job) -> dict[str, str]:
        """Give a run the GPU that the fewest others have."""
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
        self.moved(len(self._finished) + len(self._failures))

    def _fail(self, job: Job, code: int) -> None:
        reason = _last_error(self._log(job))
        self._failures.append(Failure(job=job, code=code, reason=reason, log=self._log(job)))
        self.log(f"{job.label}: FAILED (exit code {code}), {reason}; log {self._log(job)}")
        self.moved(len(self._finished) + len(self._failures))

    def _stop(self) -> None:
        """Ask every child to stop, and wait until it has; the impatient interrupt again."""
        for child in self._children.values():
            child.terminate()  # not SIGINT, which a child of a background job ignores
        if self._children:
            self.log(f"stopping {len(self._children)} runs; the same command goes on with them")
        until = time.monotonic() + _PATIENCE_S
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
    return (errors or lines or ["it wrote nothing"])[-1].removeprefix("error: ")


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block as SIGINT does."""

    def terminate(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
