"""The data source `code_tasks.problems`: a file of problems in HumanEval's format, to verify completions."""

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
        path: File of JSON lines, which may be gzipped (`.gz`), or `.parquet` file. The keys of a record are
            `task_id`, `prompt`, `entry_point`, `test` (code that defines `check(candidate)`) and optionally
            `canonical_solution`.
        sandbox: Method of confinement and limits for running the programs.
    """

    path: str
    sandbox: SandboxSettings = field(factory=SandboxSettings)


def build_problems(options: ProblemsOptions, context: BuildContext) -> DataSource:  # noqa: ARG001 - every builder gets one
    """Build the data source; all records are read and checked, but no program is run yet.

    Raises:
        WmtpError: The file cannot be read, has no records, or has invalid records, of which the message lists
            up to 20.
    """
    return ProblemsSource(options)


class ProblemsSource(DataSource):
    """Supplies problems without labelled responses, all in the split `test`; a model cannot train on them."""

    def __init__(self, options: ProblemsOptions) -> None:
        self._path = Path(options.path)
        self._judge = FunctionJudge(sandbox=options.sandbox)
        ids = ProblemIds()
        self._problems = read_records(
            self._path, _problem, check=lambda row, place: ids.add_new(row.problem_id, place)
        )

    def examples(self, split: Split) -> Sequence[Example]:  # noqa: ARG002 - the same for every split
        """Return an empty sequence, because the file contains no labelled responses."""
        return ()

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return the problems in the order of the file; all of them are in the split `test`."""
        return self._problems if split == "test" else ()

    def version(self) -> DatasetVersion:
        """Return the SHA-256, its first 12 digits as the version, and the file name up to the first dot."""
        sha256 = sha256_of_file(self._path)
        return DatasetVersion(name=self._path.name.partition(".")[0], version=sha256[:12], sha256=sha256)

    def completion(self, problem: Problem, text: str) -> str:
        """Return the part of a text that completes the prompt of the problem (see `cut_completion`)."""
        return self._judge.completion(problem, text)

    def verify(self, attempts: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Run each prompt followed by its completion against the tests of the problem."""
        return self._judge.judge(attempts).verdicts


def _problem(record: Record) -> Problem:
    name, prompt, entry_point, test = (
        text_field(record, key) for key in ("task_id", "prompt", "entry_point", "test")
    )
    if not entry_point.isidentifier():
        raise ValueError(f"`entry_point`: `{entry_point}` is not the name of a function")
    return Problem(
        problem_id=name,
        prompt=prompt,
        entry_point=entry_point,
        tests=humaneval_tests(prompt=prompt, entry_point=entry_point, test=test),
        solution=text_field(record, "canonical_solution") if "canonical_solution" in record else None,
    )
