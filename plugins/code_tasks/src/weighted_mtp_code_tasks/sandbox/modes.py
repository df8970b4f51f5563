"""Two ways to judge a program: by tests that call it, or by its stdout."""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NoReturn, Self

from . import confine, judge
from .remote import Outcome
from .watch import OUTPUT_BYTES, Candidate, Candidates, Limits
from .wire import FrameError, decode, encode, receive_frame, send_frame

_GRACE_SECONDS = 1.0  # tests may run this much longer than the time limit of the program


def run_check(job: Mapping[str, Any], candidates: Candidates, limits: Limits) -> Outcome:
    """Judge a program by tests that call it."""
    deadline = time.monotonic() + limits.wall_seconds
    with (
        _closing(os.open(os.devnull, os.O_RDONLY)) as nothing,
        Candidate(candidates, limits, stdin=nothing) as candidate,
        JudgeProcess(job, candidate.channel, deadline=deadline, limits=limits) as process,
    ):
        candidate.channel.close()  # only the judge keeps a copy of this end
        finished = candidate.watch(process.results, deadline=deadline + _GRACE_SECONDS)
        outcome = process.outcome() if finished else ("judge_error", "the tests did not end in time")
        if outcome[0] == "gone" and not candidate.wait(_GRACE_SECONDS):
            outcome = "error", "the program closed its channel"
    if candidate.stopped:
        return candidate.stopped
    return candidate.ending() if outcome[0] == "gone" else outcome


def run_cases(job: Mapping[str, Any], candidates: Candidates, limits: Limits) -> Outcome:
    """Judge a program by its stdout; it runs with each pair of stdin and expected stdout until one fails."""
    for number, (given, expected) in enumerate(job["cases"], start=1):
        kind, detail = _run_case(job["program"], given, expected, candidates=candidates, limits=limits)
        if kind != "passed":
            return kind, f"case {number}: {detail}"
    return "passed", ""


def _run_case(program: str, given: str, expected: str, *, candidates: Candidates, limits: Limits) -> Outcome:
    deadline = time.monotonic() + limits.wall_seconds
    keep = max(OUTPUT_BYTES, 2 * len(expected.encode("utf-8", "surrogatepass")))
    with (
        _closing(_file_in_memory(given)) as stdin,
        _closing(os.open(os.devnull, os.O_RDWR)) as nothing,
        Candidate(candidates, limits, stdin=stdin, errors=nothing, keep=keep) as candidate,
        _closing(os.pidfd_open(candidate.pid)) as ended,
    ):
        candidate.channel.settimeout(limits.wall_seconds)
        with suppress(OSError):  # the process has ended or does not read
            send_frame(candidate.channel, encode(("main", program)))
        if not candidate.watch(ended, deadline=deadline):
            candidate.stop("wall_limit", f"more than {limits.wall_seconds:g} s")
        answer = _final_answer(candidate.channel)
    if candidate.stopped:
        return candidate.stopped
    if answer is None and candidate.status != 0:
        return candidate.ending()
    if answer is not None and answer[0] != "passed":
        return answer
    return judge.compare_output(bytes(candidate.output), expected)


@contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _file_in_memory(content: str) -> int:
    descriptor = os.memfd_create("stdin")
    with os.fdopen(os.dup(descriptor), "wb") as writer:
        writer.write(content.encode("utf-8", "surrogatepass"))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _final_answer(channel: socket.socket) -> Outcome | None:
    """Return the outcome that the program's process reported; None if there is no valid report."""
    channel.setblocking(False)
    try:
        answer = decode(receive_frame(channel))
    except (EOFError, OSError, FrameError):
        return None
    return judge.main_outcome(answer)


class JudgeProcess:
    """A forked process that runs trusted tests under limits of its own; a context manager.

    Attributes:
        results: Descriptor of a pipe from which the outcome is read; if the process ends early, the pipe is
            closed and contains no outcome.
    """

    def __init__(
        self, job: Mapping[str, Any], channel: socket.socket, *, deadline: float, limits: Limits
    ) -> None:
        self.results, writer = os.pipe()
        self._reading = memoryview(mmap.mmap(-1, 1))  # shared with the forked process
        self._status: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            _become_judge(
                lambda: judge.run_check(job, channel, deadline=deadline, reading=self._reading),
                limits,
                writer,
            )
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
        """Return the outcome; call this method when `results` is readable or its other end is closed."""
        content = b""
        while part := os.read(self.results, 1 << 16):
            content += part
        if content:
            kind, detail = json.loads(content)
            return str(kind), str(detail)
        self._status = os.waitpid(self._pid, 0)[1]
        if self._reading[0]:
            return "unencodable", "the value could not be read within the limits"
        code = os.waitstatus_to_exitcode(self._status)
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return "judge_error", "the tests used too much CPU time"
        return "judge_error", f"the tests ended their process ({code})"


def _become_judge(work: Callable[[], Outcome], limits: Limits, writer: int) -> NoReturn:
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
