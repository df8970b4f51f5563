"""One worker: reads jobs from stdin, judges each, writes verdicts to stdout.

Trusted and single-threaded. For each job it forks a judge, and the zygote forks a candidate.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
from collections.abc import Mapping
from typing import Any, NoReturn

from . import zygote
from .messages import read_message, write_message
from .modes import run_cases, run_check
from .remote import one_line
from .watch import CallerGoneError, Limits

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_SECONDS_TO_LEAVE = 1.0
# The modules that tests import most; the fork of a judge already has them.
_WARM_FOR_TESTS = ("collections", "copy", "itertools", "math", "random", "re", "string", "typing")


def start(arguments: list[str]) -> NoReturn:
    """Entry point of the bootstrap: the argument is a JSON configuration."""
    main(json.loads(arguments[0]))


def main(configuration: Mapping[str, Any]) -> NoReturn:
    """Answer jobs until stdin closes, then end everything that was started."""
    commands = os.fdopen(os.dup(0), "rb", buffering=0)
    results = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    for name in _WARM_FOR_TESTS:
        importlib.import_module(name)
    limits = Limits(**configuration["limits"], caller=commands.fileno())
    candidates = Zygote(configuration["zygote"])
    gc.collect()
    gc.freeze()
    try:
        candidates.start()
        write_message(results, {"ready": True})
        while (job := read_message(commands)) is not None:
            kind, detail = _run(job, candidates, limits)
            write_message(results, {"kind": kind, "detail": one_line(detail)})
    except (BrokenPipeError, CallerGoneError):
        pass  # the caller is gone
    finally:
        candidates.stop()
    os._exit(0)


def _run(job: Mapping[str, Any], candidates: Zygote, limits: Limits) -> tuple[str, str]:
    """Judge one job; restart a zygote that failed or could not clean up."""
    try:
        return run_cases(job, candidates, limits) if "cases" in job else run_check(job, candidates, limits)
    except ZygoteDiedError as error:
        candidates.start()
        return "judge_error", f"the sandbox failed: {error}"


class ZygoteDiedError(Exception):
    """The zygote has ended unexpectedly."""


class Zygote:
    """The worker's end of a zygote.

    Args:
        command: Its command line.
    """

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._pid = 0
        self._control = socket.socket()

    def start(self) -> None:
        """Start a new zygote that inherits only one descriptor of this process."""
        self.stop()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with theirs:
            # Not `subprocess`: it imports `threading`, which makes each fork of a judge slower. All other
            # descriptors are closed on exec.
            keep = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), zygote.CONTROL)]
            self._pid = os.posix_spawn(self._command[0], self._command, os.environ, file_actions=keep)

    def stop(self) -> None:
        """End the zygote and wait; the kernel ends its children with it."""
        self._control.close()  # then it ends by itself
        if self._pid:
            ended = os.pidfd_open(self._pid)
            if not select.select([ended], [], [], _SECONDS_TO_LEAVE)[0]:
                os.kill(self._pid, signal.SIGKILL)
            os.close(ended)
            os.waitpid(self._pid, 0)
            self._pid = 0

    def spawn(self, channel: int, *, stdin: int, output: int, errors: int) -> int:
        """Make the zygote fork and confine a candidate, which waits for its program on `channel`.

        Returns:
            The candidate's process id in the namespace of this process; the kernel translates it.

        Raises:
            ZygoteDiedError: The zygote could not fork or confine the candidate.
        """
        try:
            socket.send_fds(self._control, [zygote.SPAWN], [channel, stdin, output, errors])
            message, ancillary, _, _ = self._control.recvmsg(1024, socket.CMSG_SPACE(_CREDENTIALS.size))
        except OSError as error:
            raise ZygoteDiedError(str(error)) from error
        if message != zygote.STARTED:
            raise ZygoteDiedError(message.decode(errors="replace") or "the zygote ended")
        data = next(data for _, kind, data in ancillary if kind == socket.SCM_CREDENTIALS)
        return int(_CREDENTIALS.unpack(data)[0])

    def reap(self) -> tuple[int, float]:
        """Return the wait status and the CPU seconds of the candidate, which has ended or was killed.

        Raises:
            ZygoteDiedError: The zygote could not clean up after the candidate.
        """
        try:
            self._control.send(zygote.REAP)
            message = self._control.recv(1024)
        except OSError as error:
            raise ZygoteDiedError(str(error)) from error
        if len(message) != zygote.EXIT_STATUS.size:
            raise ZygoteDiedError("the zygote ended while it cleaned up")
        status, seconds = zygote.EXIT_STATUS.unpack(message)
        return int(status), float(seconds)
