"""Label responses by judging them, and count the labelled responses."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Literal, get_args

import attrs
from attrs import frozen
from rich.console import Console
from rich.progress import Progress
from weighted_mtp_core.api import (
    SPLITS,
    Example,
    Problem,
    Span,
    Split,
    Verdict,
    WmtpError,
    example_statistics,
)

from weighted_mtp_code_tasks.judging import Judge

Made = Literal["solution", "mutant", "sample"]
_NAMED = 10


@frozen(kw_only=True)
class Candidate:
    """A response before it is judged.

    Attributes:
        response: Text of the response.
        made: Origin of the response: `solution`, `mutant` (a solution with deliberate changes) or `sample` (a
            response of unknown correctness, for example from a model).
        spans: Weights of spans of characters of the response, as in `Example.spans`.
        is_example: Whether the response becomes an example if its verdict is a label. If False, the response
            is judged but never becomes an example.
    """

    response: str
    made: Made
    spans: tuple[Span, ...] | None = None
    is_example: bool = True


@frozen(kw_only=True)
class LabelledProblem:
    """A problem, its split, and its responses, which are not judged yet."""

    problem: Problem
    split: Split
    candidates: tuple[Candidate, ...]


@frozen(kw_only=True)
class JudgedProblem:
    """A problem, its split, and its responses with their verdicts."""

    problem: Problem
    split: Split
    candidates: tuple[Candidate, ...]
    verdicts: tuple[Verdict, ...]

    def labels(self) -> Iterator[tuple[int, Candidate, Verdict]]:
        """Yield (index, response, verdict) for each response whose verdict is a label."""
        for number, (candidate, verdict) in enumerate(zip(self.candidates, self.verdicts, strict=True)):
            if verdict.is_label:
                yield number, candidate, verdict

    def solution(self) -> str | None:
        """Return the first solution that passes the tests; None if no solution passes."""
        passed = (c.response for _, c, verdict in self.labels() if c.made == "solution" and verdict.passed)
        return next(passed, None)

    def examples(self) -> Iterator[tuple[Candidate, Verdict, Example]]:
        """Yield (response, verdict, example) for each labelled response that becomes an example."""
        for number, candidate, verdict in self.labels():
            if not candidate.is_example:
                continue
            example = Example(
                example_id=f"{self.problem.problem_id}/{number}",
                problem_id=self.problem.problem_id,
                prompt=self.problem.prompt,
                response=candidate.response,
                reward=1.0 if verdict.passed else 0.0,
                spans=candidate.spans,
            )
            yield candidate, verdict, example

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the examples as rows of a file, with split, origin and verdict."""
        for candidate, verdict, example in self.examples():
            yield {
                "split": self.split,
                "made": candidate.made,
                "verdict": verdict.kind.value,
                "example": attrs.asdict(example),
            }


def judge_all(
    drawn: Sequence[LabelledProblem], judge: Judge, *, executor: Executor | None, title: str
) -> tuple[list[JudgedProblem], Mapping[str, str]]:
    """Judge all responses; return the problems with verdicts, and the provenance of the verdicts."""
    attempts = [(one.problem, candidate.response) for one in drawn for candidate in one.candidates]
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{title}: {len(attempts)} responses", highlight=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=len(attempts))
        try:
            judgement = judge.judge(attempts, on_done=lambda: progress.advance(task), executor=executor)
        except KeyboardInterrupt:
            done = int(progress.tasks[task].completed)
            console.print(f"{title}: {done} responses were judged; nothing is stored", highlight=False)
            raise
    flat = iter(judgement.verdicts)
    judged = [
        JudgedProblem(
            problem=one.problem,
            split=one.split,
            candidates=one.candidates,
            verdicts=tuple(next(flat) for _ in one.candidates),
        )
        for one in drawn
    ]
    return judged, judgement.provenance


def with_a_solution(judged: Sequence[JudgedProblem], *, name: str, tolerated: float) -> list[JudgedProblem]:
    """Return the problems that have a solution that passes the tests.

    `Problem.solution` is set to the first such solution. A warning on stderr names problems that are left
    out, but not more than ten.

    Raises:
        WmtpError: There are no problems; or the share of problems without such a solution is larger than
            `tolerated`, or no problem has one. So many failures probably mean that the tests, the limits
            or the sandbox are wrong.
    """
    if not judged:
        raise WmtpError(
            f"the files of `{name}` hold no problem of any split",
            hint="name other files in `[data.options]`",
        )
    solved = [(one, one.solution()) for one in judged]
    failed = [one for one, solution in solved if solution is None]
    kept = [
        attrs.evolve(one, problem=attrs.evolve(one.problem, solution=solution))
        for one, solution in solved
        if solution is not None
    ]
    if len(failed) > tolerated * len(judged) or not kept:
        example, verdict = failed[0].problem.problem_id, failed[0].verdicts[0]
        raise WmtpError(
            f"no reference solution passes the tests for {len(failed)} of {len(judged)} problems of "
            f"`{name}`, for example `{example}`: {verdict.kind.value} {verdict.detail}",
            hint="raise the limits in `[data.options.sandbox]`, for example `cpu_seconds`",
        )
    if failed:
        names = ", ".join(f"`{one.problem.problem_id}`" for one in failed[:_NAMED])
        more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        Console(stderr=True).print(
            f"WARNING: {name} leaves out {names}{more}: no reference solution passes the tests; "
            f"{len(kept)} problems stay",
            markup=False,
        )
    return kept


def sha256_of_tests(problems: Sequence[Problem]) -> str:
    """Return the SHA-256 of the names and tests of the problems, in the given order."""
    named = [[problem.problem_id, problem.tests] for problem in problems]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def statistics(judged: Sequence[JudgedProblem], *, kept: Sequence[JudgedProblem]) -> dict[str, Any]:
    """Return statistics of the labelled responses.

    Args:
        judged: All problems.
        kept: The problems that become data.

    Returns:
        A dict with the keys `problems` (numbers of problems by split) and `splits` (`example_statistics` by
        split), both for `kept`, and a key for each origin of responses: a dict with the number of responses
        of `judged` by verdict.
    """
    made: dict[str, Counter[str]] = {name: Counter() for name in get_args(Made)}
    for one in judged:
        for candidate, verdict in zip(one.candidates, one.verdicts, strict=True):
            made[candidate.made][verdict.kind.value] += 1
    by_split = {split: [one for one in kept if one.split == split] for split in SPLITS}
    return {
        "problems": {split: len(members) for split, members in by_split.items()},
        "splits": {
            split: example_statistics(example for one in members for _, _, example in one.examples())
            for split, members in by_split.items()
        },
        **{name: dict(counter) for name, counter in made.items()},
    }
