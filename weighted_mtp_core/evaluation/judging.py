"""Verifies completions with a data source, and computes the metrics of the verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from attrs import frozen

from weighted_mtp_core.api import DataSource, Problem, Verdict, VerdictKind
from weighted_mtp_core.metrics.pass_at_k import pass_at_k
from weighted_mtp_core.storage.atomic import atomic_write


@frozen(kw_only=True)
class JudgedCompletions:
    """Completions of problems with their verdicts, in the order of the problems.

    Attributes:
        problems: The problems.
        completions: The completions of each problem.
        verdicts: The verdict on each completion.
        whole_split: Whether the problems are all problems of their split.
    """

    problems: tuple[Problem, ...]
    completions: tuple[tuple[str, ...], ...]
    verdicts: tuple[tuple[Verdict, ...], ...]
    whole_split: bool

    def pass_rate(self, k: int) -> float:
        """Return the mean of pass@k over the problems."""
        rates = [pass_at_k(len(row), sum(verdict.passed for verdict in row), k) for row in self.verdicts]
        return sum(rates) / len(rates)

    def pass_rates(self, ks: Sequence[int]) -> dict[str, float]:
        """Return, for each k, the mean pass@k over the problems as a metric.

        If only some problems of the split were used, their number is part of the metric's name
        (`pass_at_1_of_20_problems`), because this value cannot be compared with pass@k on the whole split.
        """
        suffix = "" if self.whole_split else f"_of_{len(self.problems)}_problems"
        return {f"pass_at_{k}{suffix}": self.pass_rate(k) for k in ks}

    def metrics(self, ks: Sequence[int]) -> dict[str, float]:
        """Return the metrics of `pass_rates`, and the share of each kind of verdict that occurs."""
        kinds = [verdict.kind for row in self.verdicts for verdict in row]
        shares = {
            f"verdict_{kind.value}": kinds.count(kind) / len(kinds) for kind in VerdictKind if kind in kinds
        }
        return self.pass_rates(ks) | shares

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write `samples.jsonl` (HumanEval's sample format) and `verdicts.jsonl`; return their paths."""
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
        files = folder / "samples.jsonl", folder / "verdicts.jsonl"
        atomic_write(files[0], _jsonl(samples))
        atomic_write(files[1], _jsonl(verdicts))
        return files


def judge(
    source: DataSource,
    problems: Sequence[Problem],
    completions: Sequence[Sequence[str]],
    *,
    whole_split: bool,
) -> JudgedCompletions:
    """Verify every completion with the data source.

    Raises:
        WmtpError: The data source cannot verify the completions.
    """
    verdicts = iter(
        source.verify(
            [(problem, text) for problem, row in zip(problems, completions, strict=True) for text in row]
        )
    )
    return JudgedCompletions(
        problems=tuple(problems),
        completions=tuple(tuple(row) for row in completions),
        verdicts=tuple(tuple(islice(verdicts, len(row))) for row in completions),
        whole_split=whole_split,
    )


def _jsonl(rows: Sequence[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
