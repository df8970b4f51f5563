"""The data source `code_tasks.jsonl`: rows as in `core.jsonl`, and optional tests that judge completions."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import define, field, frozen
from weighted_mtp_core.api import (
    BuildContext,
    DataSource,
    JsonlOptions,
    JsonlSource,
    Problem,
    Split,
    Verdict,
)

from weighted_mtp_code_tasks.completion import cut_completion
from weighted_mtp_code_tasks.judging import FunctionJudge
from weighted_mtp_code_tasks.sandbox import Job
from weighted_mtp_code_tasks.sandbox.jobs import AnyJob
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings


@frozen(kw_only=True)
class JudgedJsonlOptions(JsonlOptions):
    """`[data.options]` of `code_tasks.jsonl`: the options of `core.jsonl` and the option `sandbox`.

    Attributes:
        sandbox: Method of confinement and limits for running the programs.
    """

    sandbox: SandboxSettings = field(factory=SandboxSettings)


def build_jsonl(options: JudgedJsonlOptions, context: BuildContext) -> DataSource:
    """Build the data source; all rows are read and checked, but no program is run yet.

    Raises:
        WmtpError: The options or the files are invalid; `JsonlSource` lists the reasons.
    """
    return JudgedJsonlSource(options, context)


@define(kw_only=True)
class _ProgramJudge(FunctionJudge):
    """Runs completions without their prompts, which may be prose; the tests define `check(candidate)`."""

    def completion(self, problem: Problem, text: str) -> str:
        """Return the program in a text that the policy wrote; the text itself if it has no program."""
        return cut_completion(text, prompt="", entry_point=problem.entry_point)

    def job(self, problem: Problem, completion: str) -> AnyJob:
        """Return the program and the tests for the sandbox."""
        return Job(program=completion, entry_point=problem.entry_point, tests=problem.tests)


class JudgedJsonlSource(JsonlSource):
    """Supplies the rows of files as examples, and one problem for each problem id that has rows with `tests`.

    The responses in the rows are not run; only the completions that `verify` receives are run.
    """

    def __init__(self, options: JudgedJsonlOptions, context: BuildContext) -> None:
        super().__init__(options, context)
        self._judge = _ProgramJudge(sandbox=options.sandbox)

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return each problem of the split for which any row has tests."""
        found: dict[str, Problem] = {}
        for row in self.rows(split):
            if row.tests and (row.problem_id not in found or row.is_correct):
                known = found.get(row.problem_id)
                found[row.problem_id] = Problem(
                    problem_id=row.problem_id,
                    prompt=row.prompt,
                    entry_point=row.entry_point,
                    tests=row.tests,
                    solution=row.response if row.is_correct else known.solution if known else None,
                )
        return list(found.values())

    def completion(self, problem: Problem, text: str) -> str:
        """Return the program in a text that the policy wrote; the text itself if it has no program."""
        return self._judge.completion(problem, text)

    def verify(self, attempts: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Run each completion, without its prompt, against the tests of its problem."""
        return self._judge.judge(attempts).verdicts
