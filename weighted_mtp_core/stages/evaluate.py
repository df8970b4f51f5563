"""Stage 3: quality of each head on held-out text, and pass@k by running what the policy writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import frozen

from weighted_mtp_core.api import DataSource, Problem, Verdict, VerdictKind
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.evaluation.generate import sample_completions
from weighted_mtp_core.evaluation.pass_at_k import pass_at_k
from weighted_mtp_core.recipe.schema import EvaluateTable
from weighted_mtp_core.stages.policy import head_quality
from weighted_mtp_core.stages.prepare import Prepared
from weighted_mtp_core.storage.manifest import atomic_write
from weighted_mtp_core.tracking.display import Display


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


@frozen(kw_only=True)
class Evaluation:
    """What stage 3 found.

    Attributes:
        metrics: Scalars that are the same in every run of a recipe.
        timings: Wall-clock measurements.
        files: What was written: samples and verdicts.
    """

    metrics: Mapping[str, float]
    timings: Mapping[str, float]
    files: tuple[Path, ...]

    def summary(self) -> list[tuple[str, str]]:
        """Return the lines of the closing summary."""
        rows = [(name.replace("_", " "), f"{v:.3f}") for name, v in self.metrics.items() if "pass_at" in name]
        if "tokens_per_forward" in self.metrics:
            rows.append(("decoding", f"{self.metrics['tokens_per_forward']:.2f} tokens per forward pass"))
        return rows


def evaluate(prepared: Prepared, table: EvaluateTable, *, display: Display, folder: Path) -> Evaluation:
    """Measure every head on the split `test`, and solve its problems if the source can judge them."""
    tokens = prepared.policy_tokens("test")
    batches = prepared.validation_batches(tokens, batch_size=table.batch_size)
    ce_K, accuracy_K = head_quality(prepared.policy, (b for b, _ in batches), autocast=prepared.autocast)
    metrics = {f"test_ce_head_{k + 1}": float(value) for k, value in enumerate(ce_K)}
    metrics |= {f"test_accuracy_head_{k + 1}": float(value) for k, value in enumerate(accuracy_K)}
    problems, whole_split = _problems(prepared.source, table)
    if not problems:
        return Evaluation(metrics=metrics, timings={}, files=())
    display.stage("evaluate", len(problems) * table.samples)
    sampled = sample_completions(
        prepared.policy,
        prepared.tokenizer,
        problems,
        samples=table.samples,
        temperature=table.temperature,
        seed=prepared.plan.recipe.run.seed,
        max_new_tokens=table.max_new_tokens,
        decoding=table.decoding,
        batch_size=table.batch_size,
        on_done=lambda done: display.update(done, {}),
    )
    judged = judge(prepared.source, problems, sampled.completions, whole_split=whole_split)
    return Evaluation(
        metrics=metrics | judged.metrics(table.pass_at_k) | sampled.metrics(),
        timings=sampled.timings(),
        files=judged.save(folder),
    )


def _problems(source: DataSource, table: EvaluateTable) -> tuple[tuple[Problem, ...], bool]:
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
) -> Judged:
    """Run every completion against its problem's tests."""
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
