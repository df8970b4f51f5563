"""Stage 3: quality of each head on held-out text, and pass@k by running the policy's completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import frozen

from weighted_mtp_core.api import DataSource, Problem, Split
from weighted_mtp_core.evaluation.judging import JudgedCompletions, judge
from weighted_mtp_core.generation.generate import Decoding, Sampled, sample_completions
from weighted_mtp_core.recipe.schema import EvaluateTable
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.training.head_quality import head_quality, per_head
from weighted_mtp_core.training.prepare import Prepared

_TIMED_PROBLEMS = 8  # few: the figure is a ratio of speeds, not a benchmark


@frozen(kw_only=True)
class Evaluation:
    """The results of stage 3.

    Attributes:
        metrics: Scalars that are the same in every run of a recipe.
        timings: Wall-clock measurements.
        files: The files written: samples and verdicts.
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


def evaluate(
    prepared: Prepared, table: EvaluateTable, *, display: Display, folder: Path | None, split: Split = "test"
) -> Evaluation:
    """Measure every head on a split, and solve its problems if the data source can judge them.

    Args:
        prepared: Data and policy.
        table: The options of the evaluation.
        display: Shows the progress.
        folder: Receives samples and verdicts; None in a process that only computes its shards of the policy,
            since the first process judges.
        split: The split.
    """
    tokens = prepared.policy_tokens(split)
    batches = (batch for batch, _ in prepared.validation_batches(tokens, batch_size=table.batch_size))
    ce_K, accuracy_K = head_quality(prepared.policy, batches, autocast=prepared.compute.autocast)
    values = per_head(f"{split}_ce", ce_K) | per_head(f"{split}_accuracy", accuracy_K)
    metrics = {name: float(value) for name, value in values.items()}
    problems, whole_split = first_problems(prepared.source, split, limit=table.problems)
    if not problems:
        return Evaluation(metrics=metrics, timings={}, files=())
    display.stage("evaluate", len(problems) * table.samples)
    sampled = sample(prepared, problems, table, display=display)
    files: tuple[Path, ...] = ()
    if folder is not None:
        judged = judge_samples(prepared, problems, sampled, whole_split=whole_split)
        metrics |= judged.metrics(table.pass_at_k)
        files = judged.save(folder)
    metrics |= sampled.metrics()
    timings = sampled.timings() | _speeds(prepared, problems, table)
    return Evaluation(metrics=metrics, timings=timings, files=files)


def first_problems(source: DataSource, split: Split, *, limit: int) -> tuple[tuple[Problem, ...], bool]:
    """Return the first `limit` problems of a split (0: all), and whether these are all of them."""
    problems = tuple(source.problems(split))
    if not limit or limit >= len(problems):
        return problems, True
    return problems[:limit], False


def sample(
    prepared: Prepared, problems: Sequence[Problem], table: EvaluateTable, *, display: Display
) -> Sampled:
    """Sample completions of problems from the policy; the display counts samples."""
    return sample_completions(
        prepared.policy,
        prepared.tokenizer,
        [(problem.problem_id, problem.prompt) for problem in problems],
        samples=table.samples,
        temperature=table.temperature,
        seed=prepared.plan.recipe.run.seed,
        max_new_tokens=table.max_new_tokens,
        decoding=table.decoding,
        batch_size=table.batch_size,
        on_done=lambda done: display.update(done, {}),
    )


def judge_samples(
    prepared: Prepared, problems: Sequence[Problem], sampled: Sampled, *, whole_split: bool
) -> JudgedCompletions:
    """Cut each sample to a completion, as the data source defines it, and judge it."""
    completions = [
        [prepared.source.completion(problem, text) for text in texts]
        for problem, texts in zip(problems, sampled.completions, strict=True)
    ]
    return judge(prepared.source, problems, completions, whole_split=whole_split)


def _speeds(prepared: Prepared, problems: Sequence[Problem], table: EvaluateTable) -> dict[str, float]:
    """Time both decoding methods on the same few problems, one greedy completion each."""
    decodings: tuple[Decoding, ...] = ("plain", "self_speculative")
    speeds = {}
    for decoding in decodings:
        written = sample_completions(
            prepared.policy,
            prepared.tokenizer,
            [(problem.problem_id, problem.prompt) for problem in problems[:_TIMED_PROBLEMS]],
            samples=1,
            temperature=0.0,
            seed=0,
            max_new_tokens=table.max_new_tokens,
            decoding=decoding,
            batch_size=table.batch_size,
        ).generations
        speeds[f"{decoding}_tokens_per_second"] = written.emitted / written.seconds
    return speeds
