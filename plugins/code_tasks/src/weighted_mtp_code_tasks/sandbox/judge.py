"""Judge an untrusted program in another process, by trusted tests or by its output.

The tests of each job run in a separate, forked process. So a test that never ends, or that changes the state
of the interpreter, does not affect other jobs.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import random
import socket
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, TracebackType
from typing import Any

from .remote import Outcome, Remote, RemoteFunction, Stop, exception_outcome, one_line

TESTS_FILE = "<tests>"
# Tests that end with one of these exceptions are broken, whatever values the program returned.
_NOT_ABOUT_VALUES = (NameError, ImportError, SyntaxError, MemoryError, RecursionError)


def run_check(
    job: Mapping[str, Any], channel: socket.socket, *, deadline: float, reading: memoryview
) -> Outcome:
    """Load the program, then run `check(candidate)` or the assert statements of the tests.

    Args:
        job: The keys `program`, `tests` and `entry_point`; `entry_point` is empty if the tests are assert
            statements that use names of the program.
        channel: Channel to the process of the program.
        deadline: Time on the clock `time.monotonic()` by which the program must have answered.
        reading: Shared memory for `Remote`.

    Returns:
        The kind of the verdict and its detail; the kind is `gone` if the process of the program
        ended or closed its channel.
    """
    remote = Remote(channel, deadline=deadline, reading=reading)
    random.seed(0)
    try:
        code = compile(job["tests"], TESTS_FILE, "exec", dont_inherit=True)
        names = {} if job["entry_point"] else _program_names(job["tests"], remote)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return "judge_error", one_line(f"the tests do not compile: {type(error).__name__}: {error}")
    try:
        remote.load(job["program"])
        outcome = _run_tests(code, names, entry_point=job["entry_point"], remote=remote)
    except Stop:
        outcome = "judge_error", "the tests stopped"
    except BaseException as error:  # noqa: BLE001 - each way in which tests can end is a verdict
        outcome = _judged(error, remote, job["tests"])
    return remote.stopped or outcome  # a bare `except:` in the tests may have caught `Stop`


def _run_tests(code: CodeType, names: dict[str, object], *, entry_point: str, remote: Remote) -> Outcome:
    namespace = {"__name__": "tests", **names}
    exec(code, namespace)  # noqa: S102 - the tests are trusted; the program is in another process
    if not entry_point:
        return "passed", ""
    candidate = namespace[entry_point] = RemoteFunction(remote, entry_point)
    check = namespace.get("check")
    if not callable(check):
        return "judge_error", "the tests define no `check`"
    check(candidate)
    return "passed", ""


def _program_names(tests: str, remote: Remote) -> dict[str, object]:
    """Bind the names that asserts use to modules of the standard library or to functions of the program.

    Names of built-in functions are not bound, so they mean the interpreter's functions, because a program
    could pass by defining its own `set` or `all`. But if the asserts use only such names, the name of a
    called function is bound to the program's function (MBPP 126 tests a function `sum` of the program).
    """
    nodes = list(ast.walk(ast.parse(tests)))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    called = {
        node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return {name: _bound(name, remote) for name in sorted(used - set(dir(builtins)) or called)}


def _bound(name: str, remote: Remote) -> object:
    return importlib.import_module(name) if name in sys.stdlib_module_names else RemoteFunction(remote, name)


def _judged(error: BaseException, remote: Remote, tests: str) -> Outcome:
    """Return the verdict for an exception that ended the tests.

    The exception may be the program's fault or the tests' fault.
    """
    if remote.raised is not None and remote.raised in _chain(error):
        return remote.raised_as
    where = _where(error.__traceback__, tests)
    if isinstance(error, AssertionError):
        return "wrong", one_line(f"{where}: {error}" if str(error) else where)
    shown = one_line(f"{type(error).__name__}: {error} ({where})")
    if not isinstance(error, Exception) or isinstance(error, _NOT_ABOUT_VALUES) or not remote.answered:
        return "judge_error", shown
    return "wrong", shown  # a value of the program made the tests fail


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and, if Python converted a StopIteration to it, this StopIteration."""
    yield error
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration):
        yield error.__cause__


def _where(traceback: TracebackType | None, tests: str) -> str:
    line = 0
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == TESTS_FILE:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    lines = tests.splitlines()
    return f"tests, line {line}: {lines[line - 1].strip()}" if 0 < line <= len(lines) else "tests"


def main_outcome(answer: object) -> Outcome:
    """Return the outcome of running a whole program, from the answer that its process sent."""
    match answer:
        case ("raise", ["SystemExit", *_], "" | "0" | "None", int(), int()):
            return "passed", ""
        case ("raise", list(names), str(message), int(line), int(number)) if 0 <= line < 1_000_000_000:
            return exception_outcome([str(name) for name in names], message, line=line, number=number)
    return "passed", ""


def compare_output(output: bytes, expected: str) -> Outcome:
    """Compare the output of a program with the expected output.

    White space at the ends of lines and at the end of the output is ignored.
    """
    written = [line.rstrip() for line in output.decode("utf-8", "replace").rstrip().splitlines()]
    wanted = [line.rstrip() for line in expected.rstrip().splitlines()]
    if written == wanted:
        return "passed", ""
    for number, (one, other) in enumerate(zip(written, wanted, strict=False), start=1):
        if one != other:
            return "wrong", one_line(f"line {number}: expected `{other[:100]}`, got `{one[:100]}`")
    return "wrong", f"expected {len(wanted)} lines, got {len(written)}"
