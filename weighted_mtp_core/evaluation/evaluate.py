"""Stage 3: measures each head on held-out text, and pass@k of completions at one or more temperatures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from attrs import evolve, frozen

from weighted_mtp_core.api import DataSource, Problem, Split
from weighted_mtp_core.data.samplers import evenly_spread
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.evaluation.judging import JudgedCompletions, judge
from weighted_mtp_core.generation.decoding_probe import manner_of
from weighted_mtp_core.generation.generate import (
    Decoding,
    Generations,
    Sampled,
    generate,
    most_tokens,
    sample_completions,
)
from weighted_mtp_core.recipe.schema import EvaluateTable
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.training.head_quality import head_quality
from weighted_mtp_core.training.prepare import Prepared

_CONTINUED = 32  # number of documents whose prompts are continued; each gives dozens of verifying passes
_TIMED_PROBLEMS = 8  # few are enough, because two speeds are compared only with each other


@frozen(kw_only=True)
class Evaluation:
    """The results of stage 3.

    Attributes:
        split: The split that was measured.
        metrics: Scalars that are equal in every run of the same recipe.
        timings: Wall-clock measurements.
        files: The files with samples and verdicts; empty if no completions were verified in this process.
    """

    split: Split = "test"
    metrics: Mapping[str, float]
    timings: Mapping[str, float]
    files: tuple[Path, ...]

    def summary(self) -> list[tuple[str, str]]:
        """Return the lines of the summary at the end of a run: each head, pass@k and decoding."""
        rows = []
        losses = [name for name in self.metrics if name.startswith(f"{self.split}_ce_head_")]
        for head, name in enumerate(losses, start=1):
            loss, accuracy = self.metrics[name], self.metrics[name.replace("_ce_", "_accuracy_")]
            part = name.partition("_of_")[2].replace("_", " ")
            on = f" on {part}" if part else ""
            accepted = self.metrics.get(f"acceptance_position_{head}")
            drafts = "" if accepted is None else f", {accepted:.1%} of its drafts accepted"
            rows.append(
                (f"head {head}", f"{self.split} loss {loss:.3f}{on}, accuracy {accuracy:.1%}{drafts}")
            )
        rows += [
            (name.replace("_", " "), f"{value:.3f}")
            for name, value in self.metrics.items()
            if name.startswith("pass_at")
        ]
        if "tokens_per_forward" in self.metrics:
            rows.append(("decoding", f"{self.metrics['tokens_per_forward']:.2f} tokens per forward pass"))
        return rows


def evaluate(
    prepared: Prepared, table: EvaluateTable, *, display: Display, folder: Path | None, split: Split = "test"
) -> Evaluation:
    """Measure every head on a split, and pass@k on the problems of the split if the data source has any.

    The acceptance of drafts is measured while completions of the problems are generated. If the split has no
    problems, the policy continues the prompts of some documents of the split instead, if its heads draft.

    Args:
        prepared: Data and policy.
        table: The options of the evaluation.
        display: Shows the progress.
        folder: Folder for samples and verdicts. `folder` is None in all processes except the first, because
            only the first process verifies completions; the others only compute their shards of the policy.
        split: The split to evaluate on.

    Raises:
        WmtpError: The prompt of a problem is too long for the policy, or has no tokens; or completions cannot
            be verified.
    """
    metrics = _measure_heads(prepared, table, split=split, display=display)
    problems, whole_split = _first_problems(prepared.source, split, limit=table.problems)
    if not problems:
        continued = _continue_prompts(prepared, prepared.policy_tokens(split), table, display=display)
        timings = {} if continued is None else continued.timings()
        metrics |= {} if continued is None else continued.metrics()
        return Evaluation(split=split, metrics=metrics, timings=timings, files=())
    display.stage("evaluate", len(problems) * table.samples)
    sampled = _sample(prepared, problems, table, display=display)
    files: tuple[Path, ...] = ()
    if folder is not None:
        judged = _judge_samples(prepared, problems, sampled, whole_split=whole_split)
        metrics |= judged.metrics(table.pass_at_k)
        files = judged.save(folder)
    metrics |= sampled.generations.metrics()
    if table.second_temperature is not None:
        display.stage(f"at {table.second_temperature:g}", len(problems) * table.samples)
        again = _sample(
            prepared, problems, evolve(table, temperature=table.second_temperature), display=display
        )
        if folder is not None:
            rates = _judge_samples(prepared, problems, again, whole_split=whole_split).pass_rates(
                table.pass_at_k
            )
            metrics |= {
                f"{name}_at_temperature_{table.second_temperature:g}": rate for name, rate in rates.items()
            }
    timings = sampled.generations.timings() | _speeds(prepared, problems, table)
    return Evaluation(split=split, metrics=metrics, timings=timings, files=files)


def _measure_heads(
    prepared: Prepared, table: EvaluateTable, *, split: Split, display: Display
) -> dict[str, float]:
    """Return loss, accuracy and acceptance of each head on the examples of a split.

    If only some examples of the split were used, their number is part of each metric's name.
    """
    tokens = prepared.policy_tokens(split)
    documents = evenly_spread(np.arange(len(tokens)), limit=table.examples)
    batches = prepared.batches_in_order(tokens, documents, batch_size=table.batch_size)
    shown = display.counted(f"{split} loss", len(documents), batches)
    metrics = head_quality(prepared.policy, shown, split=split, autocast=prepared.compute.autocast)
    suffix = "" if len(documents) == len(tokens) else f"_of_{len(documents)}_examples"
    return {f"{name}{suffix}": value for name, value in metrics.items()}


@frozen(kw_only=True)
class Trial:
    """The result on the validation problems at one temperature.

    `pass_rate` is pass@k for the largest k in `evaluate.pass_at_k`, or pass@1 if this key is empty.
    """

    table: EvaluateTable
    pass_rate: float
    metrics: Mapping[str, float]


def try_temperatures(
    prepared: Prepared, tables: Sequence[EvaluateTable], *, display: Display
) -> tuple[Trial, ...]:
    """Measure pass@k on the validation problems once for each of the given `[evaluate]` tables.

    Raises:
        WmtpError: There are no validation problems, the prompt of a problem is too long for the policy or
            has no tokens, or completions cannot be verified.
    """
    problems, whole_split = _first_problems(prepared.source, "validation", limit=tables[0].problems)
    if not problems:
        raise WmtpError(
            f"data source `{prepared.plan.data.address}` has no problems in the split `validation`, "
            "so no temperature can be chosen",
            hint="name the temperature",
        )
    trials = []
    for table in tables:
        display.stage(f"at {table.temperature:g}", len(problems) * table.samples)
        sampled = _sample(prepared, problems, table, display=display)
        judged = _judge_samples(prepared, problems, sampled, whole_split=whole_split)
        rate = judged.pass_rate(max(table.pass_at_k, default=1))
        trials.append(Trial(table=table, pass_rate=rate, metrics=judged.metrics(table.pass_at_k)))
    return tuple(trials)


def best_trial(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the best pass rate; among equal rates, the trial with the lowest temperature."""
    return max(trials, key=lambda trial: (trial.pass_rate, -trial.table.temperature))


def _first_problems(source: DataSource, split: Split, *, limit: int) -> tuple[tuple[Problem, ...], bool]:
    """Return the first `limit` problems of a split (0: all), and whether these are the whole split."""
    problems = tuple(source.problems(split))
    if not limit or limit >= len(problems):
        return problems, True
    return problems[:limit], False


def _sample(
    prepared: Prepared,
    problems: Sequence[Problem],
    table: EvaluateTable,
    *,
    display: Display | None = None,
) -> Sampled:
    """Sample completions of problems from the policy; the display shows the number of samples."""
    return sample_completions(
        prepared.policy,
        prepared.codec,
        [(problem.problem_id, problem.prompt) for problem in problems],
        samples=table.samples,
        temperature=table.temperature,
        seed=prepared.plan.recipe.run.seed,
        max_new_tokens=table.max_new_tokens,
        decoding=table.decoding,
        batch_size=table.batch_size,
        on_done=lambda done: display.update(done, {}) if display else None,
        autocast=prepared.compute.autocast,
    )


def _continue_prompts(
    prepared: Prepared, tokens: TokenSet, table: EvaluateTable, *, display: Display
) -> Generations | None:
    """Continue the prompts of `_CONTINUED` documents at the table's temperature.

    Returns:
        The texts with the statistics of decoding; None if no head drafts or no document has a prompt that is
            short enough.
    """
    policy = prepared.policy
    prompt_D = np.maximum(tokens.prompt_D, 1)  # if there is no prompt, the first token is used as the prompt
    fits = np.flatnonzero(prompt_D < most_tokens(policy))
    if table.decoding == "plain" or manner_of(policy).no_drafts is not None or not len(fits):
        return None
    documents = evenly_spread(fits, limit=_CONTINUED)
    display.stage("evaluate", len(documents))
    return generate(
        policy,
        [
            tokens.ids_N[first : first + length].tolist()
            for first, length in zip(tokens.start_D1[documents], prompt_D[documents], strict=True)
        ],
        max_new_tokens=table.max_new_tokens,
        eos_id=prepared.codec.eos_id,
        temperature=table.temperature,
        seed=prepared.plan.recipe.run.seed,
        streams=[tokens.example_ids[document] for document in documents],
        decoding=table.decoding,
        batch_size=table.batch_size,
        on_done=lambda done: display.update(done, {}),
        autocast=prepared.compute.autocast,
    )


def _judge_samples(
    prepared: Prepared, problems: Sequence[Problem], sampled: Sampled, *, whole_split: bool
) -> JudgedCompletions:
    """Cut each sample to a completion with the data source, and verify the completions."""
    completions = [
        [prepared.source.completion(problem, text) for text in texts]
        for problem, texts in zip(problems, sampled.completions, strict=True)
    ]
    return judge(prepared.source, problems, completions, whole_split=whole_split)


def _speeds(prepared: Prepared, problems: Sequence[Problem], table: EvaluateTable) -> dict[str, float]:
    """Return the tokens per second of both decoding methods for greedy completions of a few problems."""
    decodings: tuple[Decoding, ...] = ("plain", "self_speculative")
    speeds = {}
    for decoding in decodings:
        once = evolve(table, samples=1, pass_at_k=(1,), temperature=0.0, decoding=decoding)
        written = _sample(prepared, problems[:_TIMED_PROBLEMS], once).generations
        speeds[f"{decoding}_tokens_per_second"] = written.emitted / written.seconds
    return speeds
