"""`code_tasks.problems`: the problems of a file in HumanEval's format, for verifying completions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attrs import field, frozen
from weighted_mtp_core.api import (
    BuildContext,
    DatasetVersion,
    DataSource,
    Example,
    Problem,
    ProblemIds,
    Record,
    Split,
    Verdict,
    read_records,
    sha256_of_file,
    text_field,
)

from weighted_mtp_code_tasks.judging import FunctionJudge
from weighted_mtp_code_tasks.sandbox import humaneval_tests
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings


@frozen(kw_only=True)
class ProblemsOptions:
    """`[data.options]` of `code_tasks.problems`.

    Attributes:
        path: JSON lines with `task_id`, `prompt`, `entry_point`, `test` (it defines `check(candidate)`) and
            optionally `canonical_solution`. The file may be gzipped (`.gz`).
        sandbox: Back end and limits of the sandbox.
    """

    path: str
    sandbox: SandboxSettings = field(factory=SandboxSettings)


def build_problems(options: ProblemsOptions, context: BuildContext) -> DataSource:  # noqa: ARG001 - every builder gets one
    """Build the data source; every line is read and checked, nothing is run yet."""
    return ProblemsSource(options)


class ProblemsSource(DataSource):
    """Problems without labelled responses, all of the split `test`: to judge with, not to train on."""

    def __init__(self, options: ProblemsOptions) -> None:
        self._path = Path(options.path)
        self._judge = FunctionJudge(sandbox=options.sandbox)
        ids = ProblemIds()
        self._problems = read_records(
            self._path, _problem, check=lambda row, place: ids.add_new(row.problem_id, place)
        )

    def examples(self, split: Split) -> Sequence[Example]:  # noqa: ARG002 - the same for every split
        """Return nothing: the file has no labelled responses."""
        return ()

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return the problems of the file, in its order, as those of the split `test`."""
        return self._problems if split == "test" else ()

    def version(self) -> DatasetVersion:
        """Return the SHA-256 of the file; its first digits serve as the version."""
        sha256 = sha256_of_file(self._path)
        return DatasetVersion(name=self._path.name.partition(".")[0], version=sha256[:12], sha256=sha256)

    def completion(self, problem: Problem, text: str) -> str:
        """Return the code in the text that continues the prompt."""
        return self._judge.completion(problem, text)

    def verify(self, attempts: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Run prompt and completion against the tests of the problem."""
        return self._judge.judge(attempts).verdicts


def _problem(record: Record) -> Problem:
    name, prompt, entry_point, test = (
        text_field(record, key) for key in ("task_id", "prompt", "entry_point", "test")
    )
    if not entry_point.isidentifier():
        raise ValueError(f"`entry_point`: `{entry_point}` is no function's name")
    return Problem(
        problem_id=name,
        prompt=prompt,
        entry_point=entry_point,
        tests=humaneval_tests(prompt=prompt, entry_point=entry_point, test=test),
        solution=text_field(record, "canonical_solution") if "canonical_solution" in record else None,
    )
