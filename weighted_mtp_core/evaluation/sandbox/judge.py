"""Run trusted tests against a candidate that lives in another process.

Runs in a process of its own, forked for each job, so that a test that loops or changes the interpreter's state
harms nothing else. The tests see functions; behind each call only plain data crosses.
"""

from __future__ import annotations

import ast
import builtins
import errno
import importlib
import random
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn

from .wire import FrameError, UnencodableError, decode, encode, receive_frame, send_frame

TESTS_FILE = "<tests>"
_DETAIL_CHARACTERS = 300
_NOT_ABOUT_VALUES = (NameError, ImportError, SyntaxError, MemoryError, RecursionError)

Outcome = tuple[str, str]  # kind of verdict, detail


class Stop(BaseException):
    """Ends the tests with a verdict; not an Exception, so that `except Exception` does not swallow it."""


def one_line(text: str) -> str:
    """Return a text as one short printable line."""
    flat = " ".join(text.split())
    return "".join(each if each.isprintable() else "?" for each in flat)[:_DETAIL_CHARACTERS]


def run_check(job: Mapping[str, Any], channel: socket.socket, *, deadline: float) -> Outcome:
    """Load the program, then run `check(candidate)` or the module-level asserts of the tests.

    Args:
        job: `program`, `entry_point` (empty: the tests are asserts, and their free names are the program's),
            `tests`.
        channel: To the candidate's process.
        deadline: `time.monotonic()` at which the candidate must have answered.

    Returns:
        The kind of verdict and its detail; kind `gone` if the candidate's process ended.
    """
    remote = Remote(channel, deadline)
    random.seed(0)
    try:
        try:
            tree = ast.parse(job["tests"], TESTS_FILE)
            code = compile(tree, TESTS_FILE, "exec")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            return "judge_error", one_line(f"the tests do not compile: {type(error).__name__}: {error}")
        remote.load(job["program"])
        outcome = _run_tests(job, tree, code, remote)
    except Stop:
        outcome = "judge_error", "stopped without a reason"
    return remote.stopped or outcome  # a bare `except:` in a test may have swallowed the Stop


def _run_tests(job: Mapping[str, Any], tree: ast.Module, code: Any, remote: Remote) -> Outcome:
    entry_point = job["entry_point"]
    namespace: dict[str, object] = {"__name__": "tests"}
    if not entry_point:
        namespace |= {name: _free(name, remote) for name in _free_names(tree)}
    try:
        exec(code, namespace)  # noqa: S102 - the tests are trusted; the program is elsewhere
        if entry_point:
            candidate = RemoteFunction(remote, entry_point)
            namespace[entry_point] = candidate
            if "check" not in namespace:
                return "judge_error", "the tests define no `check`"
            namespace["check"](candidate)  # type: ignore[operator]
    except Stop:
        raise
    except BaseException as error:  # noqa: BLE001 - every way in which tests can end is a verdict
        return _judged(error, remote, job["tests"])
    return "passed", ""


def _free_names(tree: ast.Module) -> set[str]:
    used = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    return used - set(dir(builtins))


def _free(name: str, remote: Remote) -> object:
    """Resolve a name that asserts use without defining it: a library's module, else the program's."""
    if name in sys.stdlib_module_names:
        return importlib.import_module(name)
    return RemoteFunction(remote, name)


# --------------------------------------------------------------------------- the other process


class RemoteFunction:
    """A function of the program, by name."""

    __slots__ = ("_name", "_remote")

    def __init__(self, remote: Remote, name: str) -> None:
        self._remote = remote
        self._name = name

    def __call__(self, *arguments: object, **keywords: object) -> object:
        return self._remote.call(self._name, arguments, keywords)


class Opaque:
    """An object of the program that is not plain data. It can be handed back; any look at it ends the tests."""

    __slots__ = ("_number", "_remote")

    def __init__(self, remote: Remote, number: int) -> None:
        object.__setattr__(self, "_remote", remote)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> object:
        return self._remote.ask("get", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._remote.ask("set", self, name, value)

    def __call__(self, *arguments: object, **keywords: object) -> object:
        return self._remote.call(self, arguments, keywords)

    def _looked_at(self, *_: object) -> NoReturn:
        self._remote.stop("unencodable", "the tests look at a value that is not bounded plain data")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = __bool__ = _looked_at  # type: ignore[assignment]
    __len__ = __iter__ = __getitem__ = __contains__ = __add__ = __radd__ = __sub__ = __rsub__ = _looked_at
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __pow__ = __neg__ = _looked_at
    __abs__ = __round__ = __int__ = __float__ = __complex__ = __index__ = __str__ = __format__ = _looked_at
    __and__ = __or__ = __xor__ = __rand__ = __ror__ = __rxor__ = __next__ = __reversed__ = _looked_at


class Remote:
    """The candidate's process, asked one question at a time.

    Attributes:
        answered: How many questions have been answered with a value.
        raised: The exception of the program that was raised last.
        raised_as: The verdict if nothing catches it.
        stopped: The verdict once there is nothing left to ask.
    """

    def __init__(self, channel: socket.socket, deadline: float) -> None:
        self._channel = channel
        self._deadline = deadline
        self.answered = 0
        self.raised: BaseException | None = None
        self.raised_as: Outcome = ("error", "")
        self.stopped: Outcome | None = None

    def stop(self, kind: str, detail: str) -> NoReturn:
        """End the tests with this verdict, now and whatever they catch."""
        self.stopped = self.stopped or (kind, one_line(detail))
        raise Stop

    def load(self, program: str) -> None:
        """Run the program's top level.

        Raises:
            Stop: It failed.
        """
        try:
            self.ask("load", program)
        except Exception:
            self.stop(*self.raised_as)
        self.answered = 0

    def call(self, target: object, arguments: Sequence[object], keywords: Mapping[str, object]) -> object:
        """Call a function and carry over what it did to its mutable arguments."""
        return self.ask("call", target, list(arguments), dict(keywords))

    def ask(self, operation: str, *operands: object) -> object:
        """Ask and return the answer's value, or raise the program's exception here."""
        if self.stopped:
            raise Stop
        match self._exchange(self._encoded((operation, *operands))):
            case ("value", value, dict(changes)):
                self.answered += 1
                self._apply(operands, changes)
                return value
            case ("unencodable", str(why)):
                self.stop("unencodable", why)
            case ("raise", list(names), str(message), int(line), int(number)):
                self._raise([str(name) for name in names], message, line=line, number=number)
        self.stop("unencodable", "the program answered with something that is no answer")

    def _encoded(self, request: tuple[object, ...]) -> bytes:
        try:
            return encode(request, lambda value: value._number if type(value) is Opaque else None)
        except UnencodableError as error:
            self.stop("judge_error", f"the tests pass what cannot cross: {error}")

    def _exchange(self, request: bytes) -> object:
        try:
            self._channel.settimeout(max(0.001, self._deadline - time.monotonic()))
            send_frame(self._channel, request)
            return decode(receive_frame(self._channel), lambda number: Opaque(self, number))
        except TimeoutError:
            self.stop("wall_limit", "no answer in time")
        except (EOFError, ConnectionError):
            self.stop("gone", "")
        except FrameError as error:
            self.stop("unencodable", str(error))

    def _apply(self, operands: Sequence[object], changes: Mapping[object, object]) -> None:
        """Give the caller's lists, dicts and sets the content that the call left in their copies."""
        arguments = operands[1] if len(operands) == 3 else []
        for position, changed in changes.items():
            if (
                not isinstance(arguments, list)
                or type(position) is not int
                or position not in range(len(arguments))
            ):
                self.stop("unencodable", "the program answered with something that is no answer")
            argument = arguments[position]
            if type(argument) is not type(changed):
                self.stop("unencodable", "the program answered with something that is no answer")
            if isinstance(argument, list):
                argument[:] = changed  # type: ignore[call-overload]
            elif isinstance(argument, (dict, set)):
                argument.clear()
                argument.update(changed)  # type: ignore[call-overload]

    def _raise(self, names: list[str], message: str, *, line: int, number: int) -> NoReturn:
        shown = f"{names[0] if names else 'an exception'}: {message}" + (f" (line {line})" if line else "")
        self.raised_as = (_kind_of_exception(names, message, number), one_line(shown))
        for name in names:
            kind = getattr(builtins, name, None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                continue
            try:
                self.raised = kind(message)
            except TypeError:  # UnicodeDecodeError and its like want more arguments: take its base
                continue
            raise self.raised
        self.stop(*self.raised_as)  # SystemExit, KeyboardInterrupt


def _kind_of_exception(names: Sequence[str], message: str, number: int) -> str:
    if "MemoryError" in names:
        return "memory"
    if "PermissionError" in names or (names[:1] == ["RuntimeError"] and "start new thread" in message):
        return "violation"
    if "OSError" in names and number in {errno.EFBIG, errno.ENOSPC, errno.EDQUOT}:
        return "output"
    return "error"


# --------------------------------------------------------------------------- verdicts


def _judged(error: BaseException, remote: Remote, tests: str) -> Outcome:
    """Say whose fault an exception is that ended the tests."""
    if error is remote.raised:
        return remote.raised_as
    where = _where(error.__traceback__, tests)
    shown = one_line(f"{type(error).__name__}: {error} {where}")
    if isinstance(error, AssertionError):
        return "wrong", one_line(f"{where}{f': {error}' if str(error) else ''}")
    if not isinstance(error, Exception) or isinstance(error, _NOT_ABOUT_VALUES) or not remote.answered:
        return "judge_error", shown
    return "wrong", shown  # the tests stumbled over a value of the program


def _where(traceback: TracebackType | None, tests: str) -> str:
    line = 0
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == TESTS_FILE:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    lines = tests.splitlines()
    return f"tests, line {line}: {lines[line - 1].strip()}" if 0 < line <= len(lines) else "tests"


def main_outcome(answer: object) -> Outcome:
    """Return how a whole program's run ended, from its own account."""
    match answer:
        case ("raise", list(names), str(message), int(line), int(number)):
            if names[:1] == ["SystemExit"] and message in {"", "0", "None"}:
                return "passed", ""
            shown = f"{names[0] if names else 'an exception'}: {message}" + (
                f" (line {line})" if line else ""
            )
            return _kind_of_exception([str(name) for name in names], message, number), one_line(shown)
    return "passed", ""


def compare_output(output: bytes, expected: str) -> Outcome:
    """Compare what a program wrote with what it should have, apart from white space at the ends of lines."""
    written = [line.rstrip() for line in output.decode("utf-8", "replace").rstrip().splitlines()]
    wanted = [line.rstrip() for line in expected.rstrip().splitlines()]
    if written == wanted:
        return "passed", ""
    for number, (one, other) in enumerate(zip(written, wanted, strict=False), start=1):
        if one != other:
            return "wrong", one_line(f"line {number}: expected `{other[:100]}`, got `{one[:100]}`")
    return "wrong", f"expected {len(wanted)} lines, got {len(written)}"
