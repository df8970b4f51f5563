"""Judge many programs in parallel, with worker processes that each run one program at a time in a sandbox."""

from __future__ import annotations

import json
import selectors
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from weighted_mtp_core.api import RunFailedError, Verdict, VerdictKind

from weighted_mtp_code_tasks.sandbox import backends, scratch
from weighted_mtp_code_tasks.sandbox.jobs import AnyJob, Job
from weighted_mtp_code_tasks.sandbox.messages import read_message, write_message
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings

_CHECK_NOTHING = "def check(candidate):\n    candidate()\n"
# Programs that must fail; they are run first to test whether the sandbox confines programs.
_CANARIES = (
    ("reads a file outside", "def f():\n    open('/etc/passwd').read()\n"),
    ("opens a socket", "import socket\ndef f():\n    socket.socket()\n"),
    ("starts a process", "import os\ndef f():\n    os.fork()\n"),
)
TOLERATED_ERRORS = 5
_TOLERATED_SHARE = 0.05


class Sandbox:
    """Judges untrusted programs; a context manager that ends all processes that it started.

    Entering the context starts the workers and, except with the back end `trusted`, tests whether the sandbox
    confines programs. If a worker does not start or this test fails, RunFailedError is raised.

    Args:
        settings: Method of confinement (back end) and limits.
        judge_errors_tolerated: Number of programs for which judging may fail, or 5 % of the programs judged
            so far if that is more.

    Attributes:
        provenance: Back end, versions and limits, to be recorded with each label.
    """

    def __init__(self, settings: SandboxSettings, *, judge_errors_tolerated: int = TOLERATED_ERRORS) -> None:
        """Choose the back end.

        Raises:
            WmtpError: No sandbox that the settings allow works on this machine, or no folder is suitable for
                a scratch folder.
        """
        self._settings = settings
        self._backend = backends.choose_backend(settings.backend)
        self._workers: list[_Worker] = []
        self._judged = 0
        self._judge_errors = 0
        self._judge_errors_tolerated = judge_errors_tolerated
        self.provenance: Mapping[str, str] = backends.provenance(self._backend, settings)

    def __enter__(self) -> Self:
        try:
            for _ in range(self._settings.worker_count()):
                self._workers.append(_Worker(self._backend, self._settings))
            for worker in self._workers:
                worker.wait_until_ready()
            if self._backend.name != "trusted":
                self._try_canaries()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes that were started for judging."""
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def judge(self, jobs: Sequence[AnyJob], *, on_done: Callable[[], None] | None = None) -> list[Verdict]:
        """Judge programs in parallel.

        Args:
            jobs: The programs with their tests.
            on_done: Called in this thread after each verdict.

        Returns:
            One verdict for each job, in the order of the jobs.

        Raises:
            RunFailedError: More jobs could not be judged than `judge_errors_tolerated` allows, or a new
                worker, which replaces one that has ended, does not start.
            RuntimeError: The context is not entered, or an earlier call has raised an error.
        """
        if not self._workers:
            raise RuntimeError("use a Sandbox as a context manager, and make a new one after an error")
        try:
            return self._judge(jobs, on_done)
        except BaseException:
            self.close()  # workers may still be judging jobs whose verdicts nobody will read
            raise

    def _judge(self, jobs: Sequence[AnyJob], on_done: Callable[[], None] | None) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        with selectors.DefaultSelector() as busy:
            idle = list(self._workers)
            while waiting or busy.get_map():
                while waiting and idle:
                    worker, index = idle.pop(), waiting.popleft()
                    worker.send(jobs[index])
                    busy.register(worker.results, selectors.EVENT_READ, (worker, index))
                for key, _ in busy.select():
                    worker, index = key.data
                    busy.unregister(key.fileobj)
                    verdicts[index] = self._counted(worker.receive())
                    idle.append(worker)
                    if on_done is not None:
                        on_done()
        return [verdict for verdict in verdicts if verdict is not None]

    def _counted(self, verdict: Verdict) -> Verdict:
        self._judged += 1
        if verdict.kind is VerdictKind.JUDGE_ERROR:
            self._judge_errors += 1
            refuse_errors(self._judge_errors, self._judged, verdict.detail, self._judge_errors_tolerated)
        return verdict

    def _try_canaries(self) -> None:
        for what, program in _CANARIES:
            self._workers[0].send(Job(program, "f", _CHECK_NOTHING))
            verdict = self._workers[0].receive()
            if verdict.kind not in {VerdictKind.VIOLATION, VerdictKind.ERROR}:
                raise RunFailedError(
                    f"the sandbox `{self._backend.name}` does not confine programs: a program that {what} "
                    f"was judged `{verdict.kind.value}` ({verdict.detail})",
                    hint="choose another `data.options.sandbox.backend`",
                )


def refuse_errors(errors: int, judged: int, detail: str, tolerated: int = TOLERATED_ERRORS) -> None:
    """Raise an error if too many programs could not be judged.

    Raises:
        RunFailedError: `errors`, the number of programs that could not be judged, is larger than `tolerated`
            and larger than 5 % of `judged`, the number of all judged programs.
    """
    if errors > max(tolerated, _TOLERATED_SHARE * judged):
        raise RunFailedError(
            f"{errors} of {judged} programs could not be judged: {detail}",
            hint="the tests are wrong, or the sandbox fails on this machine: judge a known solution first",
        )


class _Worker:
    """Starts and controls a worker process, which is replaced if it ends unexpectedly."""

    def __init__(self, backend: backends.Backend, settings: SandboxSettings) -> None:
        self._backend = backend
        self._settings = settings
        self._start()

    def _start(self) -> None:
        self._scratch, self._scratch_is_real = backends.make_scratch(self._backend)
        configuration = {
            "zygote": backends.zygote_command(self._backend, self._settings, scratch=self._scratch),
            "limits": {
                "cpu_seconds": self._settings.cpu_seconds,
                "wall_seconds": self._settings.wall_seconds,
                "memory_bytes": self._settings.memory_mb * 1024 * 1024,
                "scratch": self._scratch,
                "scratch_is_mount": not self._scratch_is_real,
            },
        }
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._process = subprocess.Popen(
            backends.python_command("worker", json.dumps(configuration)),
            env=backends.environment(self._scratch),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            cwd="/",
            start_new_session=True,  # Ctrl-C reaches only the caller, which then ends its workers
        )

    @property
    def results(self) -> int:
        """The descriptor from which a verdict is read."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def wait_until_ready(self) -> None:
        """Wait until the worker accepts jobs.

        Raises:
            RunFailedError: The worker ended before it was ready.
        """
        if self._read() is None:
            raise RunFailedError(f"a sandbox worker did not start: {self._last_words()}")

    def send(self, job: AnyJob) -> None:
        """Send a job to the worker; `receive` returns its verdict."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the worker has ended, which `receive` handles
            write_message(self._process.stdin, job.message())

    def receive(self) -> Verdict:
        """Wait for the verdict and return it.

        If the worker process has ended, a new process is started and the verdict is `judge_error`.

        Raises:
            RunFailedError: The new process ended before it was ready.
        """
        message = self._read()
        if message is None:
            why = self._last_words()
            self.close()
            self._start()
            self.wait_until_ready()
            return Verdict(kind=VerdictKind.JUDGE_ERROR, detail=f"the worker ended: {why}")
        return Verdict(kind=VerdictKind(message["kind"]), detail=str(message["detail"]))

    def _read(self) -> dict[str, object] | None:
        assert self._process.stdout is not None
        return read_message(self._process.stdout)

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.returncode}"

    def hang_up(self) -> None:
        """Make the worker end, with all processes that it started; do not wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def close(self) -> None:
        """End the worker, wait until it has ended, and remove its files."""
        assert self._process.stdout is not None
        self.hang_up()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()
        if self._scratch_is_real:
            scratch.empty(self._scratch)
            Path(self._scratch).rmdir()
