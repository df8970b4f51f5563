"""The zygote: an interpreter that has imported common modules and forks a confined process for each program.

The zygote is started as a new process, never forked from a process that has read tests. The zygote reads no
program itself: each forked process receives its program over a channel of its own, so no program can find
another program in memory. Only one program runs at a time.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import socket
import struct
from collections.abc import Mapping
from typing import Any, NoReturn

from . import candidate, confine, scratch

CONTROL = 3
REAP, SPAWN = b"reap", b"spawn"
STARTED, FAILED = b"started", b"failed: "
EXIT_STATUS = struct.Struct("<id")

# The modules that programs import most; they are imported before the forks. `threading` is not among them,
# because its work after a fork doubles the time of the fork (0.4 ms).
_WARM = """
    abc array bisect calendar cmath collections contextlib copy dataclasses datetime decimal enum fractions
    functools hashlib heapq io itertools json math numbers operator re statistics string struct
    textwrap time traceback types typing unicodedata
"""


def start(arguments: list[str]) -> NoReturn:
    """Start the zygote with a configuration in JSON.

    The option `--try` only tests whether the interpreter starts, and `--try-namespaces` only whether the
    kernel permits namespaces.
    """
    if arguments[0] == "--try":
        os._exit(0)
    if arguments[0] == "--try-namespaces":
        confine.enter_namespaces()
        _become_first_process()
        confine.mount_scratch(arguments[1])
        os._exit(0)
    main(json.loads(arguments[0]))


def main(configuration: Mapping[str, Any]) -> NoReturn:
    """Serve the worker at the other end of the control descriptor until the worker closes its end."""
    confine.die_with_parent()
    for name in _WARM.split():
        importlib.import_module(name)
    readable = [os.open(path, os.O_PATH) for path in configuration["readable"]]
    if configuration["namespaces"]:
        confine.enter_namespaces()
        _become_first_process()
    zygote = Zygote(configuration, socket.socket(fileno=CONTROL), readable)
    gc.collect()
    gc.freeze()
    zygote.serve()
    os._exit(0)


def _become_first_process() -> None:
    """Fork process 1 of the new PID namespace; the original process only waits until process 1 ends."""
    pid = os.fork()
    if pid:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    confine.die_with_parent()


class Zygote:
    """Forks and confines a process for each program, and empties the scratch folder after each process.

    Args:
        configuration: The keys `backend`, `namespaces`, `scratch`, `cpu_seconds` and `memory_bytes`.
        control: Socket for messages and descriptors from and to the worker.
        readable: Open `O_PATH` descriptors of the files and folders that programs may read.
    """

    def __init__(self, configuration: Mapping[str, Any], control: socket.socket, readable: list[int]) -> None:
        self._backend: str = configuration["backend"]
        self._namespaces: bool = configuration["namespaces"]
        self._scratch: str = configuration["scratch"]
        self._cpu_seconds: float = configuration["cpu_seconds"]
        self._memory_bytes: int = configuration["memory_bytes"]
        self._control = control
        self._readable = readable
        self._writable = [os.open(os.devnull, os.O_PATH)]
        self._ruleset = -1
        self._filter = confine.SystemCallFilter() if self._backend != "trusted" else None
        self._open_scratch()

    def serve(self) -> None:
        """Answer the requests `spawn` and `reap` until the worker closes its end of the socket."""
        child = 0
        while True:
            kind, descriptors, _, _ = socket.recv_fds(self._control, 64, 4)
            if kind == SPAWN:
                child = os.fork()
                if child == 0:
                    self._become_candidate(*descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
            elif kind == REAP:
                _, status, usage = os.wait4(child, 0)
                self._empty_scratch()
                self._control.send(EXIT_STATUS.pack(status, usage.ru_utime + usage.ru_stime))
            else:
                return

    def _open_scratch(self) -> None:
        if self._namespaces:
            confine.mount_scratch(self._scratch)
        if self._backend == "landlock":
            self._ruleset = confine.make_ruleset(self._readable, self._writable, folder=self._scratch)

    def _empty_scratch(self) -> None:
        """Delete all files of a program; if this fails, the zygote ends and the worker starts another."""
        if not any(os.scandir(self._scratch)):
            return
        if not self._namespaces:
            scratch.empty(self._scratch)
            return
        confine.unmount_scratch(self._scratch)
        os.close(self._ruleset)
        self._open_scratch()

    def _become_candidate(self, channel: int, stdin: int, output: int, errors: int) -> NoReturn:
        try:
            for number, descriptor in ((0, stdin), (1, output), (2, errors)):
                os.dup2(descriptor, number)
            self._confine(channel)
        except (OSError, confine.ConfinementError) as error:
            self._control.send(FAILED + str(error).encode()[:500])
            os._exit(1)
        random.seed(0)  # verdicts must not depend on the random seed that a fork gets
        candidate.serve(socket.socket(fileno=channel))

    def _confine(self, channel: int) -> None:
        confine.die_with_parent()
        os.setsid()
        os.chdir(self._scratch)
        confine.limit(cpu_seconds=self._cpu_seconds, memory_bytes=self._memory_bytes)
        if self._filter is not None:
            confine.forbid_new_privileges()
        if self._backend == "landlock":
            confine.restrict_files(self._ruleset)
        if self._filter is not None:
            confine.drop_capabilities()
        self._control.send(STARTED)
        os.closerange(3, channel)
        os.closerange(channel + 1, 1024)
        if self._filter is not None:
            self._filter.install()
