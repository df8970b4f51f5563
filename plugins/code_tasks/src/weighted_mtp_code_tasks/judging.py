"""Judges for each kind of problem: they cut a text to the completion, and return a verdict on it."""

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
    """Verdicts in the order of the attempts, and everything else that they depend on (`provenance`)."""

    verdicts: list[Verdict]
    provenance: Mapping[str, str]


class Judge(ABC):
    """Judges completions of one kind of problem; the kind decides the format of `Problem.tests`."""

    def completion(self, problem: Problem, text: str) -> str:
        """Return the part of a policy's text that is judged: the code that continues the prompt."""
        return cut_completion(text, prompt=problem.prompt, entry_point=problem.entry_point)

    @abstractmethod
    def judge(
        self,
        attempts: Attempts,
        *,
        on_done: Callable[[], None] | None = None,
        executor: Executor | None = None,
    ) -> Judgement:
        """Judge completions, with `executor` as its tasks; `on_done` is called for each completion."""

    def limits(self) -> dict[str, float]:
        """Return the limits of this judge that differ from their defaults, by name."""
        return {}


@define(kw_only=True)
class FunctionJudge(Judge):
    """Runs prompt and completion; the tests define `check(candidate)`."""

    sandbox: SandboxSettings

    def job(self, problem: Problem, completion: str) -> AnyJob:
        """Return what the sandbox runs."""
        return Job(program=problem.prompt + completion, entry_point=problem.entry_point, tests=problem.tests)

    def limits(self) -> dict[str, float]:
        """Return the limits of the sandbox that differ from their defaults, by name."""
        return self.sandbox.limits()

    def judge(
        self,
        attempts: Attempts,
        *,
        on_done: Callable[[], None] | None = None,
        executor: Executor | None = None,
    ) -> Judgement:
        """Run the completions in a sandbox; each machine tests its sandbox first."""
        jobs = [self.job(problem, text) for problem, text in attempts]
        if executor is not None:
            verdicts, provenance = judge_as_tasks(jobs, self.sandbox, executor, on_done=on_done)
            return Judgement(verdicts=verdicts, provenance=provenance)
        with Sandbox(self.sandbox) as sandbox:
            return Judgement(verdicts=sandbox.judge(jobs, on_done=on_done), provenance=sandbox.provenance)


@define(kw_only=True)
class AssertsJudge(FunctionJudge):
    """Runs the completion alone, because the prompt is prose; the tests are asserts that use its names."""

    def completion(self, problem: Problem, text: str) -> str:
        """Return the program in the text."""
        return cut_completion(text, prompt="", entry_point=problem.entry_point)

    def job(self, problem: Problem, completion: str) -> AnyJob:
        """Return what the sandbox runs."""
        return AssertsJob(program=completion, tests=problem.tests)


@define(kw_only=True)
class StdinJudge(FunctionJudge):
    """Runs the completion alone, once per case; the tests are JSON: pairs of stdin and expected stdout."""

    def completion(self, problem: Problem, text: str) -> str:  # noqa: ARG002 - the same for every problem
        """Return the program in the text."""
        return cut_program(text)

    def job(self, problem: Problem, completion: str) -> AnyJob:
        """Return what the sandbox runs."""
        return StdinJob(program=completion, cases=[(given, out) for given, out in json.loads(problem.tests)])
