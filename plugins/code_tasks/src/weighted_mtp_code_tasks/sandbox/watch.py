"""Watch the process of an untrusted program: its CPU time, threads, output and files.

The limits on these are enforced by another process, which the program cannot influence. In case this other
process fails, the kernel also limits CPU time and the size of each file. Memory is limited only by the kernel
(see `confine.limit`).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from . import scratch
from .remote import Outcome

OUTPUT_BYTES = 1024 * 1024
UNREAD_BYTES = 64 * OUTPUT_BYTES
"""Number of bytes that a program may print if its output is not judged; debugging output is harmless."""
MAX_THREADS = 64
_TICK_SECONDS = 0.05
_FIRST_TICK_SECONDS = 0.02
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_CPU_SIGNALS = {signal.SIGKILL, signal.SIGXCPU}


class CallerGoneError(Exception):
    """Raised if the process that waits for the verdict has ended."""


class Limits(NamedTuple):
    """Limits of one program.

    Attributes:
        cpu_seconds: CPU time of all threads of the program together.
        wall_seconds: Elapsed time, which also limits programs that sleep.
        memory_bytes: Address space of the program, and also of the process that runs its tests.
        scratch: The folder to which the program may write.
        scratch_is_mount: Whether this folder is a mount in the program's own namespace.
        caller: Descriptor of a pipe; its other end closes when the process that waits for the verdict ends.
    """

    cpu_seconds: float
    wall_seconds: float
    memory_bytes: int
    scratch: str
    scratch_is_mount: bool
    caller: int


class Candidates(Protocol):
    """Makes confined processes for untrusted programs."""

    def spawn(self, channel: int, *, stdin: int, output: int, errors: int) -> int:
        """Fork a confined process and return its id."""

    def reap(self) -> tuple[int, float]:
        """Clean up after the process, which must have ended; return its wait status and its CPU seconds."""


class Candidate:
    """The process of an untrusted program, from its start to its end; a context manager.

    Attributes:
        channel: The judging side's end of the channel to the program.
        pid: Id of the process, valid until the `with` block ends.
        output: What the program wrote to stdout, if output is kept; also to stderr, unless stderr has a
            separate descriptor.
        stopped: The verdict if the process was stopped because it exceeded a limit; otherwise None.
        status: The wait status of the process, which is set when the `with` block ends.
    """

    def __init__(
        self, candidates: Candidates, limits: Limits, *, stdin: int, errors: int | None = None, keep: int = 0
    ) -> None:
        """Start the process.

        Args:
            candidates: Makes the process.
            limits: Limits of the process.
            stdin: Descriptor for the program's stdin.
            errors: Descriptor for the program's stderr; None sends stderr to stdout.
            keep: Maximum number of bytes of output; the output is stored in `output`. A program that writes
                more is stopped. With 0, output is discarded, and the maximum is `UNREAD_BYTES`.
        """
        self._candidates = candidates
        self._limits = limits
        self._keep = keep
        self._written = 0
        self.output = bytearray()
        self.stopped: Outcome | None = None
        self.status = 0
        self._cpu_seconds = 0.0
        self.channel, theirs = socket.socketpair()
        self._reader, writer = os.pipe()
        try:
            self.pid = candidates.spawn(
                theirs.fileno(), stdin=stdin, output=writer, errors=writer if errors is None else errors
            )
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
        """End the process with all its threads immediately."""
        for end in (os.killpg, os.kill):
            with suppress(ProcessLookupError):
                end(self.pid, signal.SIGKILL)

    def stop(self, kind: str, detail: str) -> None:
        """End the process for exceeding a limit; the first call decides the verdict, `(kind, detail)`."""
        self.stopped = self.stopped or (kind, detail)
        self.kill()

    def watch(self, until: int, *, deadline: float) -> bool:
        """Enforce the limits until the descriptor `until` is readable or closed, or the deadline has passed.

        Returns:
            True if `until` is readable or closed, False if the deadline has passed.

        Raises:
            CallerGoneError: The process that waits for the verdict has ended.
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

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` until the process ends by itself; return whether it has ended."""
        ended = os.pidfd_open(self.pid)
        try:
            return bool(select.select([ended], [], [], seconds)[0])
        finally:
            os.close(ended)

    def _read(self) -> bool:
        """Read some of the program's output; return False at its end."""
        part = os.read(self._reader, 1 << 16)
        self._written += len(part)
        most = self._keep or UNREAD_BYTES
        if self._written > most:
            self.stop("output", f"wrote more than {most} bytes")
        elif self._keep:
            self.output += part
        return bool(part)

    def _look(self) -> None:
        """Stop the process if it has exceeded a limit."""
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
        """Return the verdict on a process that ended by itself; call this method after the `with` block."""
        code = os.waitstatus_to_exitcode(self.status)
        if code >= 0:
            return "error", f"the program ended its process with status {code}"
        number = -code
        if number in _CPU_SIGNALS and self._cpu_seconds >= self._limits.cpu_seconds:
            return "cpu_limit", f"more than {self._limits.cpu_seconds:g} s of CPU time"
        if number == signal.SIGSYS:
            return "violation", "a forbidden system call"
        if number == signal.SIGKILL:
            return "memory", "killed by the kernel for lack of memory, or by itself"
        if number == signal.SIGXFSZ:
            return "output", f"a file of more than {scratch.MAX_BYTES} bytes"
        return "error", f"the program's process ended by {_name_of(number)}"


def _name_of(number: int) -> str:
    named = {each.value: each.name for each in signal.Signals}
    return named.get(number, f"signal {number}")
