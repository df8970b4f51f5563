"""Run one job and watch it: the candidate's CPU time, threads, output, disk; the wall clock behind all.

The limits are enforced from here, where the candidate cannot reach them; the kernel's own are a backstop.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Protocol, Self

from . import confine, judge, scratch
from .wire import FrameError, decode, encode, receive_frame, send_frame

OUTPUT_BYTES = 1024 * 1024
MAX_THREADS = 64
_TICK_SECONDS = 0.05
_FIRST_TICK_SECONDS = 0.02
_GRACE_SECONDS = 1.0
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_CPU_SIGNALS = {signal.SIGKILL, signal.SIGXCPU}

Outcome = tuple[str, str]  # kind of verdict, detail


class CallerGoneError(Exception):
    """Nobody waits for the verdict any more."""


class Limits(NamedTuple):
    """What one program may use.

    Attributes:
        cpu_seconds: CPU time of the candidate, over all its threads.
        wall_seconds: The backstop.
        memory_bytes: Address space, of the candidate and of the judge.
        scratch: The folder that the program may write to.
        scratch_is_mount: Whether it is a mount that only the candidate and the zygote see.
        caller: Descriptor whose hanging up means that nobody waits any more.
    """

    cpu_seconds: float
    wall_seconds: float
    memory_bytes: int
    scratch: str
    scratch_is_mount: bool
    caller: int


class Candidates(Protocol):
    """Where processes for candidates come from."""

    def spawn(self, channel: int, *, stdin: int, output: int) -> int:
        """Fork a confined process and return its id."""

    def reap(self) -> tuple[int, float]:
        """Return the wait status and CPU seconds of the process, which has ended, and clean up behind it."""


def run_check(job: Mapping[str, Any], candidates: Candidates, limits: Limits) -> Outcome:
    """Judge a program by tests that call it."""
    deadline = time.monotonic() + limits.wall_seconds
    with (
        open(os.devnull, "rb") as nothing,  # noqa: PTH123 - a descriptor is what is wanted
        Candidate(candidates, limits, stdin=nothing.fileno()) as candidate,
        JudgeProcess(lambda: judge.run_check(job, candidate.channel, deadline=deadline), limits) as process,
    ):
        candidate.channel.close()  # the judge's copy must be the last one
        finished = candidate.watch(process.results, deadline=deadline + _GRACE_SECONDS)
        outcome = process.outcome() if finished else ("judge_error", "the tests did not end in time")
    if candidate.stopped:
        return candidate.stopped
    return candidate.ending() if outcome[0] == "gone" else outcome


def run_cases(job: Mapping[str, Any], candidates: Candidates, limits: Limits) -> Outcome:
    """Judge a program by what it writes to stdout; it is run anew for each (stdin, stdout) of `cases`."""
    for number, (given, expected) in enumerate(job["cases"], start=1):
        kind, detail = _run_case(job["program"], given, expected, candidates=candidates, limits=limits)
        if kind != "passed":
            return kind, f"case {number}: {detail}"
    return "passed", ""


def _run_case(program: str, given: str, expected: str, *, candidates: Candidates, limits: Limits) -> Outcome:
    stdin = os.memfd_create("stdin")
    try:
        with os.fdopen(os.dup(stdin), "wb") as writer:
            writer.write(given.encode("utf-8", "surrogatepass"))
        os.lseek(stdin, 0, os.SEEK_SET)
        with Candidate(candidates, limits, stdin=stdin) as candidate:
            ended = os.pidfd_open(candidate.pid)
            try:
                candidate.channel.settimeout(limits.wall_seconds)
                with suppress(OSError):
                    send_frame(candidate.channel, encode(("main", program)))
                deadline = time.monotonic() + limits.wall_seconds
                if not candidate.watch(ended, deadline=deadline):
                    candidate.stop("wall_limit", f"more than {limits.wall_seconds:g} s")
            finally:
                os.close(ended)
            candidate.kill()
            answer = _final_answer(candidate.channel)
    finally:
        os.close(stdin)
    if candidate.stopped:
        return candidate.stopped
    if answer is None:
        if candidate.status != 0:
            return candidate.ending()
    elif answer[0] != "passed":
        return answer
    return judge.compare_output(bytes(candidate.output), expected)


def _final_answer(channel: socket.socket) -> Outcome | None:
    """Return how a program's run ended by its own account; None if it left without one."""
    channel.setblocking(False)
    try:
        answer = decode(receive_frame(channel))
    except (EOFError, OSError, FrameError):
        return None
    return judge.main_outcome(answer)


class Candidate:
    """One candidate's process from its start to its end; use as a context manager.

    Attributes:
        channel: Our end of the channel to it.
        pid: Its process id, valid until the end of the context.
        output: The first `OUTPUT_BYTES` bytes of what it wrote to stdout and stderr.
        stopped: The verdict if it was stopped for breaking a limit.
        status: Its wait status, after the context.
    """

    def __init__(self, candidates: Candidates, limits: Limits, *, stdin: int) -> None:
        self._candidates = candidates
        self._limits = limits
        self.output = bytearray()
        self.stopped: Outcome | None = None
        self.status = 0
        self._cpu_seconds = 0.0
        self.channel, theirs = socket.socketpair()
        self._reader, writer = os.pipe()
        try:
            self.pid = candidates.spawn(theirs.fileno(), stdin=stdin, output=writer)
        except BaseException:
            self._close()
            raise
        finally:
            theirs.close()
            os.close(writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        try:
            self.status, self._cpu_seconds = self._candidates.reap()
            os.set_blocking(self._reader, False)
            with suppress(BlockingIOError):
                while self._read():
                    pass
        finally:
            self._close()

    def _close(self) -> None:
        self.channel.close()
        os.close(self._reader)

    def kill(self) -> None:
        """End the process now, and with it its threads."""
        for end in (os.killpg, os.kill):
            with suppress(ProcessLookupError):
                end(self.pid, signal.SIGKILL)

    def stop(self, kind: str, detail: str) -> None:
        """End the process for breaking a limit."""
        self.stopped = self.stopped or (kind, detail)
        self.kill()

    def watch(self, until: int, *, deadline: float) -> bool:
        """Enforce the limits until the descriptor `until` is readable or closed, or the deadline has passed.

        Returns:
            False at the deadline.

        Raises:
            CallerGoneError: The worker's caller is gone.
        """
        poll = select.poll()
        poll.register(until, select.POLLIN)
        poll.register(self._reader, select.POLLIN)
        poll.register(self._limits.caller, 0)
        next_look = time.monotonic() + _FIRST_TICK_SECONDS
        while (now := time.monotonic()) < deadline:
            events = dict(poll.poll(max(1, 1000 * (min(next_look, deadline) - now))))
            if until in events:
                return True
            if self._limits.caller in events:
                raise CallerGoneError
            if self._reader in events and not self._read():
                poll.unregister(self._reader)
            if time.monotonic() >= next_look:
                self._look()
                next_look = time.monotonic() + _TICK_SECONDS
        return False

    def _read(self) -> bool:
        """Take what the program wrote; False at the end."""
        part = os.read(self._reader, 1 << 16)
        if len(self.output) + len(part) > OUTPUT_BYTES:
            self.stop("output", f"wrote more than {OUTPUT_BYTES} bytes")
        else:
            self.output += part
        return bool(part)

    def _look(self) -> None:
        """Stop the process if it has used too much."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:  # noqa: PTH123 - 20 times a second
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return
        cpu_seconds = (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS
        if cpu_seconds > self._limits.cpu_seconds:
            self.stop("cpu_limit", f"more than {self._limits.cpu_seconds:g} s of CPU time")
        if int(fields[17]) > MAX_THREADS:
            self.stop("violation", f"more than {MAX_THREADS} threads")
        if self._wrote_too_much():
            self.stop("output", f"more than {scratch.MAX_BYTES} bytes or {scratch.MAX_FILES} files on disk")

    def _wrote_too_much(self) -> bool:
        folder = self._limits.scratch
        if self._limits.scratch_is_mount:
            return scratch.is_mount_too_full(f"/proc/{self.pid}/root{folder}")
        return scratch.is_too_full(folder)

    def ending(self) -> Outcome:
        """Say why a process ended that should not have, after the context."""
        code = os.waitstatus_to_exitcode(self.status)
        if code >= 0:
            return "error", f"the program ended its process with status {code}"
        number = signal.Signals(-code)
        if number in _CPU_SIGNALS and self._cpu_seconds >= self._limits.cpu_seconds:
            return "cpu_limit", f"more than {self._limits.cpu_seconds:g} s of CPU time"
        if number == signal.SIGSYS:
            return "violation", "a forbidden system call"
        if number == signal.SIGXFSZ:
            return "output", f"a file of more than {scratch.MAX_BYTES} bytes"
        return "error", f"the program's process ended by {number.name}"


class JudgeProcess:
    """A forked process that runs the trusted tests under limits of its own; use as a context manager.

    Attributes:
        results: Descriptor on which its outcome arrives; closed without one if it dies.
    """

    def __init__(self, work: Callable[[], Outcome], limits: Limits) -> None:
        self.results, writer = os.pipe()
        self._status: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            _judge_and_exit(work, limits, writer)
        os.close(writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        os.close(self.results)

    def _end(self) -> int:
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)
            self._status = os.waitpid(self._pid, 0)[1]
        return self._status

    def outcome(self) -> Outcome:
        """Read the outcome, once `results` is readable or closed."""
        content = b""
        while part := os.read(self.results, 1 << 16):
            content += part
        if content:
            kind, detail = json.loads(content)
            return str(kind), str(detail)
        self._status = os.waitpid(self._pid, 0)[1]
        code = os.waitstatus_to_exitcode(self._status)
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return "judge_error", "the tests used too much CPU time"
        return "judge_error", f"the tests ended their process ({code})"


def _judge_and_exit(work: Callable[[], Outcome], limits: Limits, writer: int) -> NoReturn:
    try:
        confine.die_with_parent()
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        cpu = int(limits.cpu_seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(writer, json.dumps(work()).encode())
    finally:
        os._exit(0)
