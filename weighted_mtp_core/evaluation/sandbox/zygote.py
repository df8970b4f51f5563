"""A warm interpreter that forks one confined process per program.

Started fresh (never forked from a process that has seen tests), it reads no program itself: the child gets it
over its own channel, so that no program can find another's in memory. One program runs at a time.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from . import candidate, confine

# What programs import most; a fork gets them for nothing.
WARM = (
    "abc array bisect calendar cmath collections contextlib copy dataclasses datetime decimal enum fractions "
    "functools hashlib heapq io itertools json math numbers operator queue re statistics string struct "
    "textwrap threading time traceback types typing unicodedata"
).split()
EXIT_STATUS = struct.Struct("<id")
REAP, SPAWN = b"reap", b"spawn"
STARTED, FAILED = b"started", b"failed: "


def main(configuration: Mapping[str, Any], descriptor: int) -> NoReturn:
    """Serve the worker at the other end of `descriptor` until it goes away."""
    confine.die_with_parent()
    sys.setswitchinterval(0.005)
    control = socket.socket(fileno=descriptor)
    for name in WARM:
        importlib.import_module(name)
    zygote = Zygote(configuration, control)
    if configuration["namespaces"]:
        confine.enter_namespaces()
        _become_first_process()
    gc.collect()
    gc.freeze()
    zygote.serve()
    os._exit(0)


def _become_first_process() -> None:
    """Fork the process that is number 1 of the new PID namespace; this one only waits for it."""
    pid = os.fork()
    if pid:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    confine.die_with_parent()


class Zygote:
    """Forks, confines, reaps, and leaves the scratch folder empty.

    Args:
        configuration: `backend`, `namespaces`, `scratch`, `readable`, `cpu_seconds`, `memory_bytes`.
        control: Messages from and to the worker, with descriptors.
    """

    def __init__(self, configuration: Mapping[str, Any], control: socket.socket) -> None:
        self._configuration = configuration
        self._control = control
        self._scratch: str = configuration["scratch"]
        paths = [path for path in configuration["readable"] if os.path.exists(path)]
        self._readable = [os.open(path, os.O_PATH) for path in paths]
        self._writable = [os.open("/dev/null", os.O_PATH)]

    def serve(self) -> None:
        """Answer `spawn` and `reap` until the worker closes its end."""
        child = 0
        while message := self._receive():
            kind, descriptors = message
            if kind == SPAWN:
                self._open_scratch()
                child = os.fork()
                if child == 0:
                    self._child(descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
            elif kind == REAP:
                _, status, usage = os.wait4(child, 0)
                self._clear_scratch()
                self._control.send(EXIT_STATUS.pack(status, usage.ru_utime + usage.ru_stime))

    def _receive(self) -> tuple[bytes, list[int]] | None:
        kind, descriptors, _, _ = socket.recv_fds(self._control, 64, 3)
        return (kind, descriptors) if kind else None

    def _open_scratch(self) -> None:
        if self._configuration["namespaces"]:
            confine.mount_scratch(self._scratch)

    def _clear_scratch(self) -> None:
        """Empty the scratch folder, or end: the worker then starts a new zygote with a new one."""
        if self._configuration["namespaces"]:
            confine.unmount_scratch(self._scratch)
            return
        for entry in os.scandir(self._scratch):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)

    def _child(self, descriptors: list[int]) -> NoReturn:
        """Become the candidate's process."""
        channel_descriptor, stdin, stdout = descriptors
        try:
            for number, descriptor in ((0, stdin), (1, stdout), (2, stdout)):
                os.dup2(descriptor, number)
            self._confine(channel_descriptor)
        except (OSError, confine.ConfinementError) as error:
            self._fail(error)
        random.seed(0)  # forking reseeds from the system, and a verdict must not depend on that
        candidate.serve(socket.socket(fileno=channel_descriptor))
        os._exit(0)

    def _confine(self, channel_descriptor: int) -> None:
        configuration = self._configuration
        confine.die_with_parent()
        os.setsid()
        os.chdir(self._scratch)
        signal.set_wakeup_fd(-1)
        confine.limit(cpu_seconds=configuration["cpu_seconds"], memory_bytes=configuration["memory_bytes"])
        backend = configuration["backend"]
        if backend != "trusted":
            confine.forbid_new_privileges()
        if backend == "landlock":
            confine.restrict_files(self._readable, self._writable, scratch=self._scratch)
        if backend != "trusted":
            confine.drop_capabilities()
        self._control.send(STARTED)
        os.closerange(3, channel_descriptor)
        os.closerange(channel_descriptor + 1, 1024)
        if backend != "trusted":
            confine.filter_system_calls()

    def _fail(self, error: Exception) -> NoReturn:
        try:
            self._control.send(FAILED + str(error).encode()[:500])
        finally:
            os._exit(1)


def start(arguments: list[str]) -> NoReturn:
    """Run from the bootstrap line: a JSON configuration and the number of the control descriptor."""
    if arguments == ["--try"]:
        os._exit(0)
    if arguments[0] == "--try-namespaces":
        confine.enter_namespaces()
        _become_first_process()
        confine.mount_scratch(arguments[1])
        os._exit(0)
    main(json.loads(arguments[0]), int(arguments[1]))
