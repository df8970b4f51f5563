"""Stage 3: quality of each head on held-out text, and pass@k by running what the policy writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from attrs import frozen

from weighted_mtp_core.api import DataSource, Problem, Verdict, VerdictKind
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.evaluation.pass_at_k import pass_at_k
from weighted_mtp_core.recipe.schema import EvaluateTable
from weighted_mtp_core.storage.manifest import atomic_write


@frozen(kw_only=True)
class Judged:
    """Completions of problems with their verdicts, `samples` for each problem, in problem order."""

    problems: tuple[Problem, ...]
    completions: tuple[tuple[str, ...], ...]
    verdicts: tuple[tuple[Verdict, ...], ...]
    whole_split: bool

    def metrics(self, ks: Sequence[int]) -> dict[str, float]:
        """Return mean pass@k over the problems and the share of each verdict.

        A limited set says so in the metric's name (`pass_at_1_of_20_problems`): a figure on part of a
        benchmark is another figure.
        """
        passed = [(len(row), sum(verdict.passed for verdict in row)) for row in self.verdicts]
        suffix = "" if self.whole_split else f"_of_{len(self.problems)}_problems"
        rates = {f"pass_at_{k}{suffix}": sum(pass_at_k(n, c, k) for n, c in passed) / len(passed) for k in ks}
        everything = [verdict.kind for row in self.verdicts for verdict in row]
        shares = {
            f"verdict_{kind.value}": everything.count(kind) / len(everything)
            for kind in VerdictKind
            if kind in everything
        }
        return rates | shares

    def save(self, folder: Path) -> None:
        """Write `samples.jsonl` (HumanEval's sample format) and `verdicts.jsonl`."""
        folder.mkdir(parents=True, exist_ok=True)
        samples, verdicts = [], []
        for problem, completions, row in zip(self.problems, self.completions, self.verdicts, strict=True):
            for completion, verdict in zip(completions, row, strict=True):
                samples.append({"task_id": problem.problem_id, "completion": completion})
                verdicts.append(
                    {
                        "task_id": problem.problem_id,
                        "passed": verdict.passed,
                        "verdict": verdict.kind.value,
                        "detail": verdict.detail,
                    }
                )
        atomic_write(folder / "samples.jsonl", _jsonl(samples))
        atomic_write(folder / "verdicts.jsonl", _jsonl(verdicts))


def _jsonl(rows: Sequence[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def check_evaluation(table: EvaluateTable) -> None:
    """Refuse settings that cannot give the figures they ask for, before anything is trained.

    Raises:
        WmtpError: Fewer samples than k, or several samples that are all the greedy one.
    """
    largest = max(table.pass_at_k, default=1)
    if table.samples < largest:
        raise WmtpError(
            f"evaluate.samples is {table.samples}, but pass@{largest} needs {largest} samples a problem",
            hint=f"set `evaluate.samples = {largest}` and a temperature above 0",
        )
    if table.samples > 1 and table.temperature == 0:
        raise WmtpError(
            f"evaluate.samples is {table.samples} at temperature 0: every sample would be the same",
            hint="set `evaluate.temperature` above 0, e.g. 0.8",
        )


def chosen_problems(source: DataSource, table: EvaluateTable) -> tuple[tuple[Problem, ...], bool]:
    """Return the problems of the split `test` to solve, and whether that is all of them."""
    problems = tuple(source.problems("test"))
    if not table.problems or table.problems >= len(problems):
        return problems, True
    return problems[: table.problems], False


def judge(
    source: DataSource,
    problems: Sequence[Problem],
    completions: Sequence[Sequence[str]],
    *,
    whole_split: bool,
    say: Callable[[str], None],
) -> Judged:
    """Run every completion against its problem's tests."""
    say(f"judging {sum(map(len, completions))} programs of {len(problems)} problems")
    flat = source.verify(
        [(problem, text) for problem, row in zip(problems, completions, strict=True) for text in row]
    )
    verdicts, first = [], 0
    for row in completions:
        verdicts.append(tuple(flat[first : first + len(row)]))
        first += len(row)
    return Judged(
        problems=tuple(problems),
        completions=tuple(tuple(row) for row in completions),
        verdicts=tuple(verdicts),
        whole_split=whole_split,
    )
