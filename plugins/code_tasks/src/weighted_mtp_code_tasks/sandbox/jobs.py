"""The unit of judging: a program and its tests."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import field, frozen
from attrs import validators as v


@frozen
class Job:
    """A program and trusted tests that call it.

    Attributes:
        program: The whole source (prompt and completion).
        entry_point: Name of the function that the tests get as `candidate`.
        tests: Trusted source that defines `check(candidate)` and raises AssertionError on a wrong answer. It
            runs outside the program's process and has no access to other names of the program.
    """

    program: str
    entry_point: str = field(validator=v.min_len(1))
    tests: str

    def message(self) -> dict[str, object]:
        """Return the message to a worker."""
        return {"program": self.program, "entry_point": self.entry_point, "tests": self.tests}


@frozen
class AssertsJob:
    """A program and trusted asserts whose free names are the program's functions.

    Attributes:
        program: The whole source.
        tests: Trusted statements such as `assert add(1, 2) == 3`.
    """

    program: str
    tests: str

    def message(self) -> dict[str, object]:
        """Return the message to a worker."""
        return {"program": self.program, "entry_point": "", "tests": self.tests}


@frozen
class StdinJob:
    """A program that reads stdin and writes stdout.

    Attributes:
        program: The whole source, run as `__main__` once for each case.
        cases: (stdin, expected stdout) pairs; white space at the ends of lines does not matter.
    """

    program: str
    cases: Sequence[tuple[str, str]] = field(validator=v.min_len(1))

    def message(self) -> dict[str, object]:
        """Return the message to a worker."""
        return {"program": self.program, "cases": [list(case) for case in self.cases]}


AnyJob = Job | AssertsJob | StdinJob


def humaneval_tests(*, prompt: str, entry_point: str, test: str) -> str:
    """Return trusted tests for a problem in HumanEval's format.

    `check` may call helpers that the prompt defines (`poly`, `encode_cyclic`). The tests contain the prompt,
    so these helpers are the prompt's own: a program could define others that make it pass.
    """
    for ending in ("\n    pass\n", "\n\tpass\n", "\n  pass\n", "\n"):
        source = f"{prompt.rstrip()}{ending}"
        try:
            compile(source, entry_point, "exec", dont_inherit=True)
        except SyntaxError:
            continue
        return f"{source}\n\n{test}"
    return test
