"""Objects by which trusted tests exchange plain data with the process of an untrusted program."""

from __future__ import annotations

import builtins
import errno
import socket
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

from .wire import FrameError, UnencodableError, decode, encode, receive_frame, send_frame

Outcome = tuple[str, str]  # kind of verdict, detail

_DETAIL_CHARACTERS = 300
_MAX_LINE = 1_000_000_000
_NO_ANSWER = "the program answered with something that is not a valid answer"


class Stop(BaseException):
    """Ends the tests with a verdict; `except Exception` does not catch it, because it is a BaseException."""


def one_line(text: str) -> str:
    """Return a text as one line of at most 300 printable characters."""
    flat = " ".join(text[: 10 * _DETAIL_CHARACTERS].split())
    return "".join(each if each.isprintable() else "?" for each in flat)[:_DETAIL_CHARACTERS]


def exception_outcome(names: Sequence[str], message: str, *, line: int, number: int) -> Outcome:
    """Return the verdict on a program that ended with an exception.

    Args:
        names: Names of the class of the exception and of its base classes, most derived first.
        message: Text of the exception.
        line: Line of the program at which the exception was raised; 0 if it is unknown.
        number: The errno of the exception; 0 if it has none.
    """
    kind = "error"
    if "MemoryError" in names:
        kind = "memory"
    elif "PermissionError" in names or number == errno.EROFS or "can't start new thread" in message:
        kind = "violation"
    elif number in {errno.EFBIG, errno.ENOSPC, errno.EDQUOT}:
        kind = "output"
    place = f" (line {line})" if line else ""
    return kind, one_line(f"{names[0] if names else 'an exception'}: {message}{place}")


class Remote:
    """The process of an untrusted program, to which requests are sent one at a time.

    Args:
        channel: Channel to the process of the program.
        deadline: Time on the clock `time.monotonic()` by which the program must have answered.
        reading: Shared memory, whose element 0 is 1 while an answer is decoded. If the judging process is
            killed during that time, the answer is to blame: for example, a set of a million numbers with
            equal hashes takes hours to build.

    Attributes:
        answered: Whether the program has answered a request of the tests.
        raised: The exception that this process raised because the program raised one, most recently; None
            before the first one.
        raised_as: The verdict if the tests do not catch this exception.
        stopped: The verdict with which the tests must end; None while the tests may continue.
    """

    def __init__(self, channel: socket.socket, *, deadline: float, reading: memoryview | None = None) -> None:
        self._channel = channel
        self._deadline = deadline
        self._reading = memoryview(bytearray(1)) if reading is None else reading
        self.answered = False
        self.raised: Exception | None = None
        self.raised_as: Outcome = ("error", "")
        self.stopped: Outcome | None = None

    def stop(self, kind: str, detail: str) -> NoReturn:
        """End the tests with a verdict, which holds even if the tests catch all exceptions."""
        self.stopped = self.stopped or (kind, one_line(detail))
        raise Stop

    def load(self, program: str) -> None:
        """Execute the program as a module.

        Raises:
            Stop: The program raised an exception or did not return a usable answer.
        """
        try:
            self.ask("load", program)
        except Exception:  # noqa: BLE001 - any exception of the program decides the verdict
            self.stop(*self.raised_as)
        self.answered = False

    def call(self, target: object, arguments: Sequence[object], keywords: Mapping[str, object]) -> object:
        """Call a function of the program.

        Changes that the function makes to lists, dicts and sets among its positional arguments are applied to
        the originals.

        An exception of the function is raised again.

        Raises:
            Stop: The tests must end (see `ask`).
        """
        return self.ask("call", target, list(arguments), dict(keywords))

    def ask(self, operation: str, *operands: object) -> object:
        """Send a request and return the value of the answer; an exception of the program is raised again.

        Raises:
            Stop: The program did not return a usable answer or raised an exception such as SystemExit, the
                request contains a value that is not plain data, or an earlier request has stopped the tests.
        """
        if self.stopped:
            raise Stop
        answer = self._exchange((operation, *operands))
        self.answered = True
        match answer:
            case ("value", value, dict(changes)):
                self._apply(operands, changes)
                return value
            case ("unencodable", str(why)):
                self.stop("unencodable", why)
            case ("raise", list(names), str(message), int(line), int(number)) if 0 <= line < _MAX_LINE:
                self._raise([str(name) for name in names], message, line=line, number=number)
        return self.stop("unencodable", _NO_ANSWER)

    def _exchange(self, request: tuple[object, ...]) -> object:
        try:
            content = encode(request, _number_of_opaque)
        except UnencodableError as error:
            self.stop("judge_error", f"the tests pass a value that cannot be sent to the program: {error}")
        try:
            self._channel.settimeout(max(0.001, self._deadline - time.monotonic()))
            send_frame(self._channel, content)
            answer = receive_frame(self._channel)
            self._reading[0] = 1
            value = decode(answer, lambda number: Opaque(self, number))
            self._reading[0] = 0
        except TimeoutError:
            self.stop("wall_limit", "no answer in time")
        except (EOFError, ConnectionError):
            self.stop("gone", "")
        except FrameError as error:
            self.stop("unencodable", str(error))
        return value

    def _apply(self, operands: Sequence[object], changes: Mapping[object, object]) -> None:
        """Give the caller's lists, dicts and sets the content that the program gave to their copies."""
        arguments = operands[1] if len(operands) == 3 and isinstance(operands[1], list) else []
        for position, changed in changes.items():
            if type(position) is not int or not 0 <= position < len(arguments):
                self.stop("unencodable", _NO_ANSWER)
            match arguments[position], changed:
                case list() as argument, list():
                    argument[:] = changed
                case dict() as argument, dict():
                    argument.clear()
                    argument.update(changed)
                case set() as argument, set():
                    argument.clear()
                    argument.update(changed)
                case _:
                    self.stop("unencodable", _NO_ANSWER)

    def _raise(self, names: list[str], message: str, *, line: int, number: int) -> NoReturn:
        """Raise the nearest built-in base class of the program's exception; `Stop` if it is no Exception."""
        self.raised_as = exception_outcome(names, message, line=line, number=number)
        for name in names:
            kind = getattr(builtins, name, None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                continue
            try:
                self.raised = kind(message)
            except TypeError:  # some, like UnicodeDecodeError, need more arguments: use the base class
                continue
            raise self.raised
        self.stop(*self.raised_as)  # for SystemExit and KeyboardInterrupt


class RemoteFunction:
    """A function of the program, identified by its name; calling it sends a request to the program."""

    __slots__ = ("_name", "_remote")

    def __init__(self, remote: Remote, name: str) -> None:
        self._remote = remote
        self._name = name

    def __call__(self, *arguments: object, **keywords: object) -> object:  # noqa: D102 - see the class
        return self._remote.call(self._name, arguments, keywords)


class Opaque:
    """An object of the program that is not plain data.

    Tests can pass such an object back to the program, call it, and get or set its attributes. Operators and
    built-in functions such as `len` end the tests, because they would inspect the object outside the program.
    """

    __slots__ = ("_number", "_remote")
    _number: int
    _remote: Remote

    def __init__(self, remote: Remote, number: int) -> None:
        object.__setattr__(self, "_remote", remote)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> object:
        return self._remote.ask("get", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._remote.ask("set", self, name, value)

    def __call__(self, *arguments: object, **keywords: object) -> object:  # noqa: D102 - see the class
        return self._remote.call(self, arguments, keywords)


def _number_of_opaque(value: object) -> int | None:
    return value._number if type(value) is Opaque else None  # noqa: SLF001 - the class is in this module


def _looked_at(opaque: Opaque, *_: object) -> NoReturn:
    opaque._remote.stop("unencodable", "the tests look at a value that is not bounded plain data")  # noqa: SLF001


# The methods of operators and built-in functions, which Python looks up in the class, not by `__getattr__`.
_SPECIAL = """
    abs add and bool bytes ceil complex contains delitem divmod enter eq exit float floor floordiv format ge
    getitem gt hash index int invert iter le len lshift lt matmul mod mul ne neg next or pos pow radd rand
    rdivmod repr reversed rfloordiv rlshift rmatmul rmod rmul ror round rpow rrshift rshift rsub rtruediv rxor
    setitem str sub truediv trunc xor
"""
for _name in _SPECIAL.split():
    setattr(Opaque, f"__{_name}__", _looked_at)
