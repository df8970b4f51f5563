"""A worker process: reads jobs from stdin, judges the program of each job, and writes verdicts to stdout.

The worker is trusted and has a single thread. It starts a zygote, which is an interpreter in the sandbox that
forks a process for each program. The worker itself forks a process for the tests that call the program.
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
# The modules that tests import most; they are imported before the fork of a process for tests.
_WARM_FOR_TESTS = ("collections", "copy", "itertools", "math", "random", "re", "string", "typing")


def start(arguments: list[str]) -> NoReturn:
    """Start the worker, with a configuration in JSON as its argument."""
    main(json.loads(arguments[0]))


def main(configuration: Mapping[str, Any]) -> NoReturn:
    """Judge jobs until stdin closes; then end all processes that were started."""
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
        pass  # the process that waits for verdicts has ended
    finally:
        candidates.stop()
    os._exit(0)


def _run(job: Mapping[str, Any], candidates: Zygote, limits: Limits) -> tuple[str, str]:
    """Judge one job; if the zygote has failed or could not clean up, start a new one."""
    try:
        return run_cases(job, candidates, limits) if "cases" in job else run_check(job, candidates, limits)
    except ZygoteDiedError as error:
        candidates.start()
        return "judge_error", f"the sandbox failed: {error}"


class ZygoteDiedError(Exception):
    """Raised if the zygote has ended unexpectedly, or could not confine or clean up a process."""


class Zygote:
    """Starts and controls a zygote, the interpreter that forks a confined process for each program.

    Args:
        command: Command line of the zygote.
    """

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._pid = 0
        self._control = socket.socket()

    def start(self) -> None:
        """Start a new zygote, which inherits one end of a socket pair, stdin, stdout and stderr."""
        self.stop()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with theirs:
            # `subprocess` is not used, because it imports `threading`, which makes every fork slower. All
            # other descriptors are closed on exec.
            keep = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), zygote.CONTROL)]
            self._pid = os.posix_spawn(self._command[0], self._command, os.environ, file_actions=keep)

    def stop(self) -> None:
        """End the zygote and wait until it has ended; the kernel also ends the processes that it forked."""
        self._control.close()  # makes the zygote end by itself
        if self._pid:
            ended = os.pidfd_open(self._pid)
            if not select.select([ended], [], [], _SECONDS_TO_LEAVE)[0]:
                os.kill(self._pid, signal.SIGKILL)
            os.close(ended)
            os.waitpid(self._pid, 0)
            self._pid = 0

    def spawn(self, channel: int, *, stdin: int, output: int, errors: int) -> int:
        """Make the zygote fork and confine a process, which receives its program over `channel`.

        Returns:
            The id of the new process in the namespace of this process; the kernel translates it.

        Raises:
            ZygoteDiedError: The zygote could not fork or confine the process.
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
        """Return the wait status and the CPU seconds of the forked process, which must have ended.

        Raises:
            ZygoteDiedError: The zygote could not clean up after the process.
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
