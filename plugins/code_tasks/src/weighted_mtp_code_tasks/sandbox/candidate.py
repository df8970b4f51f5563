"""Run one untrusted program inside the sandbox, and answer the requests of the process that judges it.

This code shares a process with the program, so it is not trusted: the judging process decodes every answer as
plain data.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from socket import socket
from typing import Any, NoReturn

from .wire import FrameError, UnencodableError, decode, encode, receive_frame, send_frame

PROGRAM_FILE = "<program>"
_MUTABLE = (list, dict, set)
_MESSAGE_CHARACTERS = 300


def serve(channel: socket) -> NoReturn:
    """Answer requests until there are no more; then end this process and its threads.

    There are no more requests after the program was run as `__main__`, or when the other end of the channel
    closes.
    """
    program = Program()
    try:
        while True:
            send_frame(channel, program.answer(receive_frame(channel)))
            if program.ended:
                break
    except (EOFError, OSError, FrameError):
        pass
    os._exit(0)


class Program:
    """The module of the program, and its objects to which the judging process refers by number.

    Attributes:
        ended: Whether the program has been started as `__main__`, after which no request is answered.
    """

    def __init__(self) -> None:
        self.ended = False
        self._module = types.ModuleType("candidate")
        self._objects: list[object] = []
        self._number_of: dict[int, int] = {}
        self._operations: dict[object, Callable[..., object]] = {
            "load": self._load,
            "main": self._main,
            "call": self._call,
            "get": getattr,
            "set": setattr,
        }

    def answer(self, frame: bytes) -> bytes:
        """Carry out a request and return the encoded answer; exceptions are encoded, too, and not raised."""
        try:
            return self._answered(*self._request(frame))
        except UnencodableError as error:
            return encode(("unencodable", str(error)))
        except BaseException as error:  # noqa: BLE001 - it is sent as data and raised again by the judge
            return encode(("raise", *_described(error)))

    def _request(self, frame: bytes) -> tuple[str, list[Any]]:
        request = decode(frame, self._objects.__getitem__)
        if not isinstance(request, tuple):
            raise FrameError("a request is a tuple")
        return request[0], list(request[1:])

    def _answered(self, operation: str, operands: list[Any]) -> bytes:
        watched = self._mutable(operands[1]) if operation == "call" else {}
        value = self._operations[operation](*operands)
        changes = {
            position: argument
            for position, (argument, before) in watched.items()
            if self._encode(argument) != before
        }
        return self._encode(("value", value, changes))

    def _load(self, source: str) -> None:
        self._run(source, "candidate")

    def _main(self, source: str) -> None:
        self.ended = True
        try:
            self._run(source, "__main__")
        finally:
            if "threading" in sys.modules:
                sys.modules["threading"]._shutdown()  # noqa: SLF001 - waits for threads, as Python does at exit
            sys.stdout.flush()
            sys.stderr.flush()

    def _run(self, source: str, name: str) -> None:
        self._module.__name__ = name
        sys.modules[name] = self._module
        exec(compile(source, PROGRAM_FILE, "exec", dont_inherit=True), self._module.__dict__)  # noqa: S102

    def _call(self, target: object, arguments: list[object], keywords: dict[str, object]) -> object:
        if isinstance(target, str):
            if target not in self._module.__dict__:
                raise NameError(f"name '{target}' is not defined")
            target = self._module.__dict__[target]
        return target(*arguments, **keywords)  # type: ignore[operator]

    def _mutable(self, arguments: list[object]) -> dict[int, tuple[object, bytes]]:
        return {
            position: (argument, self._encode(argument))
            for position, argument in enumerate(arguments)
            if isinstance(argument, _MUTABLE)
        }

    def _encode(self, value: object) -> bytes:
        return encode(value, self._number)

    def _number(self, value: object) -> int:
        """Keep an object that is not plain data, and return the number that stands for it in messages."""
        if id(value) not in self._number_of:
            self._number_of[id(value)] = len(self._objects)
            self._objects.append(value)
        return self._number_of[id(value)]


def _described(error: BaseException) -> tuple[list[str], str, int, int]:
    """Return class names (most derived first), message, line in the program and errno of an exception."""
    try:
        message = str(error)[:_MESSAGE_CHARACTERS]
    except BaseException:  # noqa: BLE001 - `__str__` may be code of the program
        message = ""
    names = [str(kind.__name__)[:80] for kind in type(error).__mro__[:8]]
    number = error.errno if isinstance(error, OSError) else None
    return names, message, _line(error), number if type(number) is int else 0


def _line(error: BaseException) -> int:
    line = error.lineno or 0 if isinstance(error, SyntaxError) else 0
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == PROGRAM_FILE:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line
