"""Stage 3: quality of each head on held-out text, and pass@k by running what the policy writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import frozen

from weighted_mtp_core.api import DataSource, Problem, Split, Verdict, VerdictKind
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.generation.generate import Decoding, Sampled, sample_completions
from weighted_mtp_core.metrics.pass_at_k import pass_at_k
from weighted_mtp_core.recipe.schema import EvaluateTable
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.training.policy_learner import head_quality
from weighted_mtp_core.training.prepare import Prepared

_TIMED_PROBLEMS = 8  # few: the figure is a ratio of speeds, not a benchmark


@frozen(kw_only=True)
class JudgedCompletions:
    """Completions of problems with their verdicts, `samples` for each problem, in problem order."""

    problems: tuple[Problem, ...]
    completions: tuple[tuple[str, ...], ...]
    verdicts: tuple[tuple[Verdict, ...], ...]
    whole_split: bool

    def pass_rate(self, k: int) -> float:
        """Return mean pass@k over the problems."""
        rates = [pass_at_k(len(row), sum(verdict.passed for verdict in row), k) for row in self.verdicts]
        return sum(rates) / len(rates)

    def metrics(self, ks: Sequence[int]) -> dict[str, float]:
        """Return mean pass@k over the problems and the share of each verdict.

        A limited set says so in the metric's name (`pass_at_1_of_20_problems`): a figure on part of a
        benchmark is another figure.
        """
        suffix = "" if self.whole_split else f"_of_{len(self.problems)}_problems"
        rates = {f"pass_at_{k}{suffix}": self.pass_rate(k) for k in ks}
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
    return "".join(json.dumps(row) + "\n" for row in rows)


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


def evaluate(
    prepared: Prepared, table: EvaluateTable, *, display: Display, folder: Path | None, split: Split = "test"
) -> Evaluation:
    """Measure every head on a split, and solve its problems if the source can judge them.

    Args:
        prepared: Data and policy.
        table: What to measure.
        display: Shows the progress.
        folder: Where samples and verdicts go; None in a process that only computes its part of a split
            policy, and leaves judging to the first one.
        split: Which one.
    """
    tokens = prepared.policy_tokens(split)
    batches = prepared.validation_batches(tokens, batch_size=table.batch_size)
    ce_K, accuracy_K = head_quality(prepared.policy, (b for b, _ in batches), autocast=prepared.autocast)
    metrics = {f"{split}_ce_head_{k + 1}": float(value) for k, value in enumerate(ce_K)}
    metrics |= {f"{split}_accuracy_head_{k + 1}": float(value) for k, value in enumerate(accuracy_K)}
    problems, whole_split = some_problems(prepared.source, split, limit=table.problems)
    if not problems:
        return Evaluation(metrics=metrics, timings={}, files=())
    display.stage("evaluate", len(problems) * table.samples)
    sampled = _sample(prepared, problems, table, display=display)
    files: tuple[Path, ...] = ()
    if folder is not None:
        judged = _judge_samples(prepared, problems, sampled, whole_split=whole_split)
        metrics |= judged.metrics(table.pass_at_k)
        files = judged.save(folder)
    metrics |= sampled.metrics()
    timings = sampled.timings() | _speeds(prepared, problems, table)
    return Evaluation(metrics=metrics, timings=timings, files=files)


@frozen(kw_only=True)
class Trial:
    """The validation problems solved at one temperature; `pass_rate` is pass@k of the largest k."""

    table: EvaluateTable
    pass_rate: float
    metrics: Mapping[str, float]


def try_temperatures(
    prepared: Prepared, tables: Sequence[EvaluateTable], *, display: Display
) -> tuple[Trial, ...]:
    """Solve the validation problems with each table.

    Raises:
        WmtpError: There are no validation problems.
    """
    limit = tables[0].problems
    problems, whole_split = some_problems(prepared.source, "validation", limit=limit)
    if not problems:
        raise WmtpError(
            f"data source `{prepared.plan.data.address}` has no problems in the split `validation`, "
            "so no temperature can be chosen",
            hint="name the temperature",
        )
    trials = []
    for table in tables:
        display.stage(f"at {table.temperature:g}", len(problems) * table.samples)
        _, judged = solve(prepared, problems, table, display=display, whole_split=whole_split)
        ks = table.pass_at_k
        trials.append(
            Trial(table=table, pass_rate=judged.pass_rate(max(ks, default=1)), metrics=judged.metrics(ks))
        )
    return tuple(trials)


def best_trial(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the best pass rate; of equal ones that with the lowest temperature."""
    return max(trials, key=lambda trial: (trial.pass_rate, -trial.table.temperature))


def some_problems(source: DataSource, split: Split, *, limit: int) -> tuple[tuple[Problem, ...], bool]:
    """Return the first `limit` problems of a split (0: all), and whether that is all of them."""
    problems = tuple(source.problems(split))
    if not limit or limit >= len(problems):
        return problems, True
    return problems[:limit], False


def solve(
    prepared: Prepared,
    problems: Sequence[Problem],
    table: EvaluateTable,
    *,
    display: Display,
    whole_split: bool,
) -> tuple[Sampled, JudgedCompletions]:
    """Let the policy solve problems, and judge what it writes; the display's stage counts samples."""
    sampled = _sample(prepared, problems, table, display=display)
    return sampled, _judge_samples(prepared, problems, sampled, whole_split=whole_split)


def _sample(
    prepared: Prepared, problems: Sequence[Problem], table: EvaluateTable, *, display: Display
) -> Sampled:
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


def _judge_samples(
    prepared: Prepared, problems: Sequence[Problem], sampled: Sampled, *, whole_split: bool
) -> JudgedCompletions:
    completions = [
        [prepared.source.completion(problem, text) for text in texts]
        for problem, texts in zip(problems, sampled.completions, strict=True)
    ]
    return judge(prepared.source, problems, completions, whole_split=whole_split)


def _speeds(prepared: Prepared, problems: Sequence[Problem], table: EvaluateTable) -> dict[str, float]:
    """Time both ways of decoding on the same few problems, one greedy completion each."""
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


def judge(
    source: DataSource,
    problems: Sequence[Problem],
    completions: Sequence[Sequence[str]],
    *,
    whole_split: bool,
) -> JudgedCompletions:
    """Run every completion against its problem's tests."""
    flat = source.verify(
        [(problem, text) for problem, row in zip(problems, completions, strict=True) for text in row]
    )
    verdicts, first = [], 0
    for row in completions:
        verdicts.append(tuple(flat[first : first + len(row)]))
        first += len(row)
    return JudgedCompletions(
        problems=tuple(problems),
        completions=tuple(tuple(row) for row in completions),
        verdicts=tuple(verdicts),
        whole_split=whole_split,
    )
