"""Judges extract completions from texts and judge them: the base class, and judges that run programs."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

from attrs import define, frozen
from weighted_mtp_core.api import Problem, Verdict

from weighted_mtp_code_tasks.completion import cut_completion, cut_program
from weighted_mtp_code_tasks.sandbox import AssertsJob, Job, Sandbox, StdinJob
from weighted_mtp_code_tasks.sandbox.jobs import AnyJob
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings
from weighted_mtp_code_tasks.sandbox.tasks import judge_as_tasks

Attempts = Sequence[tuple[Problem, str]]


@frozen(kw_only=True)
class Judgement:
    """Verdicts in the order of the attempts, and their provenance.

    Attributes:
        verdicts: One verdict for each attempt.
        provenance: Facts on which verdicts can depend, by name, such as versions, machine and limits.
    """

    verdicts: list[Verdict]
    provenance: Mapping[str, str]


class Judge(ABC):
    """Judges completions of one kind of problem; subclasses define the format of `Problem.tests`."""

    def completion(self, problem: Problem, text: str) -> str:
        """Return the part of a policy's text that is judged; by default, the result of `cut_completion`."""
        return cut_completion(text, prompt=problem.prompt, entry_point=problem.entry_point)

    @abstractmethod
    def judge(
        self,
        attempts: Attempts,
        *,
        on_done: Callable[[], None] | None = None,
        executor: Executor | None = None,
    ) -> Judgement:
        """Judge completions.

        Args:
            attempts: Pairs of a problem and a completion.
            on_done: Called once for each completion that is judged.
            executor: If given, its tasks may judge the completions, possibly on other machines; otherwise,
                this machine judges them.
        """

    def limits(self) -> dict[str, float]:
        """Return those limits of this judge that differ from their defaults, by name."""
        return {}


@define(kw_only=True)
class FunctionJudge(Judge):
    """Runs the prompt followed by the completion; the tests define `check(candidate)`."""

    sandbox: SandboxSettings

    def job(self, problem: Problem, completion: str) -> AnyJob:
        """Return the program and the tests for the sandbox."""
        return Job(program=problem.prompt + completion, entry_point=problem.entry_point, tests=problem.tests)

    def limits(self) -> dict[str, float]:
        """Return those limits of the sandbox that differ from their defaults, by name."""
        return self.sandbox.limits()

    def judge(
        self,
        attempts: Attempts,
        *,
        on_done: Callable[[], None] | None = None,
        executor: Executor | None = None,
    ) -> Judgement:
        """Run the completions in a sandbox, after a test whether the sandbox confines programs.

        The back end `trusted` confines nothing and is not tested.

        Raises:
            WmtpError: No sandbox that the settings allow works, no folder is suitable for a scratch folder,
                or the sandboxes of two machines could give different verdicts.
            RunFailedError: The sandbox does not confine programs, a worker does not start, too many programs
                could not be judged, or a task of the executor failed.
        """
        jobs = [self.job(problem, text) for problem, text in attempts]
        if executor is not None:
            verdicts, provenance = judge_as_tasks(jobs, self.sandbox, executor, on_done=on_done)
            return Judgement(verdicts=verdicts, provenance=provenance)
        with Sandbox(self.sandbox) as sandbox:
            return Judgement(verdicts=sandbox.judge(jobs, on_done=on_done), provenance=sandbox.provenance)


@define(kw_only=True)
class AssertsJudge(FunctionJudge):
    """Runs completions without their prompts, which are only docstrings; the tests are assert statements.

    The asserts, and code that prepares them, use names that the completion defines.
    """

    def completion(self, problem: Problem, text: str) -> str:
        """Return the program in a text that the policy wrote; the text itself if it has no program."""
        return cut_completion(text, prompt="", entry_point=problem.entry_point)

    def job(self, problem: Problem, completion: str) -> AnyJob:
        """Return the program and the tests for the sandbox."""
        return AssertsJob(program=completion, tests=problem.tests)


@define(kw_only=True)
class StdinJudge(FunctionJudge):
    """Runs completions without their prompts, which are only docstrings, once for each case of the tests.

    The tests are JSON: a list of cases, which are pairs of stdin and expected stdout.
    """

    def completion(self, problem: Problem, text: str) -> str:  # noqa: ARG002 - the same for every problem
        """Return the program in a text that the policy wrote; the text itself if it has no program."""
        return cut_program(text)

    def job(self, problem: Problem, completion: str) -> AnyJob:
        """Return the program and the tests for the sandbox."""
        return StdinJob(program=completion, cases=[(given, out) for given, out in json.loads(problem.tests)])
