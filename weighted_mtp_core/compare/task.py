"""A run of a comparison as a task, whose function and arguments an executor can send to another machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from attrs import frozen

from weighted_mtp_core.compare.jobs import WantedRun
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.executors.same_code import place
from weighted_mtp_core.exit_codes import EXIT_TERMINATED

KILL = "kill"
"""Content of the file `RunTask.order` that ends runs at once."""

ORDER_S = 1.0
"""Interval in seconds at which a task reads `RunTask.order`, which may be on a network file system."""

STOP_LIMIT_S = 60.0
"""Maximum seconds that a run may take after SIGTERM to end its step and write a checkpoint."""

# The kernel sends SIGTERM to the run if this process dies, so that a lost worker leaves no run behind.
_END_WITH_PARENT = (
    "import ctypes, os, signal, sys; "
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM); "  # PR_SET_PDEATHSIG
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)
_THREAD = threading.local()


@frozen(kw_only=True)
class RunTask:
    """A run to execute or to resume; its relative paths are relative to the worker's working folder.

    Attributes:
        wanted: The properties by which the folder of the run is found.
        command: The command-line arguments with which Python executes the run.
        log: File for the output of the process.
        threads: Number of threads of the run.
        order: A file of the client, the process that executes `compare`. The run continues while the file is
            empty, is killed if the file contains `KILL`, and stops with a checkpoint if the file has other
            content or is missing.
    """

    wanted: WantedRun
    command: Sequence[str]
    log: Path
    threads: int
    order: Path


@frozen(kw_only=True)
class Ended:
    """The result of a task.

    Attributes:
        code: Exit code of the run's process; 0 if the run had already finished, `EXIT_TERMINATED` if it was
            stopped before it began.
        folder: Folder of the finished run; None if `code` is not 0, or if no finished run with the wanted
            properties was found.
        reason: If `folder` is None, why: usually the last `error:` line of the run's output.
        host: Name of the machine.
    """

    code: int
    folder: Path | None
    reason: str
    host: str


def use_gpu(name: str) -> None:
    """Make all later tasks of this thread use one GPU; `name` is a value for CUDA_VISIBLE_DEVICES."""
    _THREAD.environment = {"CUDA_VISIBLE_DEVICES": name}


def execute(task: RunTask) -> Ended:
    """Execute a run in a process of its own, unless another process completes it or the client stops.

    Raises:
        WmtpError: This machine does not have the file `RunTask.order` of the client.
    """
    if not task.order.is_file():
        raise WmtpError(
            f"the worker at {place()} has no file `{task.order}`, which the client has written",
            hint="share the storage with the worker, and start the worker in the client's working folder",
        )
    while task.wanted.is_running() and _order(task) == "":
        time.sleep(ORDER_S)  # the process of a lost worker ends by itself and leaves a checkpoint
    found, code = task.wanted.finished(), 0
    if found is None:
        code = _run(task) if _order(task) == "" else EXIT_TERMINATED
        found = task.wanted.finished() if code == 0 else None
    # If the exit code is 0 but no folder was found, the recorded run differs from the job that was planned.
    reason = _last_error(task.log) if code else "its recipe or the source of a plugin was edited"
    return Ended(code=code, folder=found, reason=reason, host=socket.gethostname())


def _run(task: RunTask) -> int:
    with task.log.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _END_WITH_PARENT, str(os.getpid()), *task.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(task.threads),
                **getattr(_THREAD, "environment", {}),
            },
            start_new_session=True,  # so that Ctrl-C in a terminal does not reach the child directly
        )
    stop_by = None
    while True:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=ORDER_S)
        order = _order(task)
        if order and stop_by is None:
            child.terminate()  # SIGTERM, because a child of a background job ignores SIGINT
            stop_by = time.monotonic() + STOP_LIMIT_S
        if order == KILL or (stop_by is not None and time.monotonic() > stop_by):
            child.kill()


def _order(task: RunTask) -> str:
    """Return the content of the client's file, or `stop` if the file is missing.

    Opening the file anew makes NFS show its latest content.
    """
    try:
        return task.order.read_text(encoding="utf-8")
    except FileNotFoundError:
        return "stop"
    except OSError:  # the network has failed
        return ""


def _last_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ")
