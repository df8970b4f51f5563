"""Jobs of the sandbox: a job is a program with its tests."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import field, frozen
from attrs import validators as v


@frozen
class Job:
    """A program, and trusted tests that call a function of the program.

    Attributes:
        program: The whole source code, for example a prompt followed by a completion.
        entry_point: Name of the function that the tests get as `candidate`.
        tests: Trusted source code that defines `check(candidate)`, which raises AssertionError if an answer
            is wrong. The tests run outside the program's process and cannot use other names of the program.
    """

    program: str
    entry_point: str = field(validator=v.min_len(1))
    tests: str

    def message(self) -> dict[str, object]:
        """Return the job as a message to a worker."""
        return {"program": self.program, "entry_point": self.entry_point, "tests": self.tests}


@frozen
class AssertsJob:
    """A program, and trusted assert statements that call the program's functions by name.

    Attributes:
        program: The whole source code.
        tests: Trusted statements such as `assert add(1, 2) == 3`.
    """

    program: str
    tests: str

    def message(self) -> dict[str, object]:
        """Return the job as a message to a worker."""
        return {"program": self.program, "entry_point": "", "tests": self.tests}


@frozen
class StdinJob:
    """A program that reads stdin and writes stdout.

    Attributes:
        program: The whole source code, which is run as `__main__` once for each case until a case fails.
        cases: Pairs of stdin and expected stdout; white space at the ends of lines and at the end of the
            output is ignored.
    """

    program: str
    cases: Sequence[tuple[str, str]] = field(validator=v.min_len(1))

    def message(self) -> dict[str, object]:
        """Return the job as a message to a worker."""
        return {"program": self.program, "cases": [list(case) for case in self.cases]}


AnyJob = Job | AssertsJob | StdinJob


def humaneval_tests(*, prompt: str, entry_point: str, test: str) -> str:
    """Return trusted tests for a problem in HumanEval's format.

    The function `check` may call helper functions that the prompt defines, such as `poly`. So the tests
    contain the prompt and do not use the program's helpers, which a program could replace so that wrong
    answers pass. If the prompt is not valid Python, with or without `pass` as its last line, the tests are
    `test` alone.
    """
    for ending in ("\n    pass\n", "\n\tpass\n", "\n  pass\n", "\n"):
        source = f"{prompt.rstrip()}{ending}"
        try:
            compile(source, entry_point, "exec", dont_inherit=True)
        except SyntaxError:
            continue
        return f"{source}\n\n{test}"
    return test
