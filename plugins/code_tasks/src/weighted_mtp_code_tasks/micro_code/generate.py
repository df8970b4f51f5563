"""Draw the problems of `code_tasks.micro_code`: functions with tests and with correct and broken bodies."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from weighted_mtp_core.api import Problem, Split, WmtpError

from weighted_mtp_code_tasks.labelling import Candidate, LabelledProblem
from weighted_mtp_code_tasks.micro_code.grammar import Function, indented, random_argument, random_function
from weighted_mtp_code_tasks.mutation import mutants

FORMAT = 1
"""Part of the version of the data; raise it if the code makes other programs for the same options."""

_TESTS = 10
_PROBES = 24  # arguments for which functions are compared; the first `_TESTS` of them become the tests
_PATIENCE = 3000  # the grammar counts as exhausted after so many draws in a row without a new function


def draw_problems(
    *, problems: int, level: int, solutions: int, mutants_per_solution: int, seed: int
) -> list[LabelledProblem]:
    """Draw functions that are distinct in text and in behaviour, each with correct and broken bodies.

    Raises:
        WmtpError: Fewer than `problems` distinct functions of this level were found.
    """
    generator = random.Random(seed)  # noqa: S311 - data, not secrets
    functions = distinct_functions(
        partial(random_function, generator, level=level), count=problems, level=level, raise_instead="level"
    )
    drawn = []
    for number, (function, cases) in enumerate(functions):
        candidates = tuple(_candidates(function, generator, solutions, mutants_per_solution))
        problem = as_problem(function, f"micro_{number:05d}", cases=cases, solution=candidates[0].response)
        drawn.append(LabelledProblem(problem=problem, split=split_of(number), candidates=candidates))
    return drawn


def distinct_functions(
    draw: Callable[[], Function], *, count: int, level: int, raise_instead: str
) -> Iterator[tuple[Function, list[tuple[Any, Any]]]]:
    """Yield functions that are distinct in text and in behaviour, each with its tests.

    The tests of a function are pairs of an argument and the value of the function. Functions that are almost
    constant are left out.

    Args:
        draw: Draws a function.
        count: Number of functions.
        level: Number of steps of a function, for the error message.
        raise_instead: Name of the option that the error message recommends to raise.

    Raises:
        WmtpError: Fewer than `count` distinct functions were found.
    """
    found: set[tuple[str, str]] = set()
    unlucky = 0
    while len(found) < count and unlucky < _PATIENCE:
        function = draw()
        arguments = [random_argument(function.kind, random.Random(i)) for i in range(_PROBES)]  # noqa: S311
        reference = function.reference()
        values = [reference(argument) for argument in arguments]
        behaviour = (function.kind, repr(values))
        if behaviour in found or _is_dull(values):
            unlucky += 1
            continue
        unlucky = 0
        found.add(behaviour)
        yield function, list(zip(arguments, values, strict=True))[:_TESTS]
    if len(found) < count:
        raise WmtpError(
            f"found only {len(found)} distinct functions of level {level}, not {count}",
            hint=f"lower `data.options.problems` or raise `data.options.{raise_instead}`",
        )


def _is_dull(values: list[Any]) -> bool:
    """Return whether a function is almost constant: fewer than a third of its values are distinct."""
    return len({repr(value) for value in values}) < len(values) // 3


def split_of(number: int) -> Split:
    """Return the split: of ten functions, eight are for training, one for validation, one for the test."""
    return {8: "validation", 9: "test"}.get(number % 10, "train")  # type: ignore[return-value]


def _candidates(
    function: Function, generator: random.Random, solutions: int, mutants_per_solution: int
) -> list[Candidate]:
    right = function.bodies(solutions, generator)
    broken: dict[str, None] = {}
    for body in right:
        statements = ast.parse(f"def f():\n{body}").body[0].body  # type: ignore[attr-defined]
        for mutant in mutants(statements, generator, count=mutants_per_solution):
            text = indented(ast.unparse(ast.Module(body=mutant, type_ignores=[])))
            if text not in right:
                broken[text] = None
    return [Candidate(response=text, made="solution") for text in right] + [
        Candidate(response=text, made="mutant") for text in broken
    ]


def as_problem(
    function: Function, problem_id: str, *, cases: Sequence[tuple[Any, Any]], solution: str
) -> Problem:
    """Return the problem of completing a function; each case, an argument and its value, becomes a test."""
    tests = "def check(candidate):\n" + "".join(
        f"    assert candidate({argument!r}) == {value!r}\n" for argument, value in cases
    )
    return Problem(
        problem_id=problem_id, prompt=function.prompt, entry_point="f", tests=tests, solution=solution
    )
