"""The choice of a sampling temperature on the validation problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.evaluation.evaluate import first_problems, judge_samples, sample
from weighted_mtp_core.recipe.schema import EvaluateTable
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.training.prepare import Prepared


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
    problems, whole_split = first_problems(prepared.source, "validation", limit=tables[0].problems)
    if not problems:
        raise WmtpError(
            f"data source `{prepared.plan.data.address}` has no problems in the split `validation`, "
            "so no temperature can be chosen",
            hint="name the temperature",
        )
    trials = []
    for table in tables:
        display.stage(f"at {table.temperature:g}", len(problems) * table.samples)
        sampled = sample(prepared, problems, table, display=display)
        judged = judge_samples(prepared, problems, sampled, whole_split=whole_split)
        rate = judged.pass_rate(max(table.pass_at_k, default=1))
        trials.append(Trial(table=table, pass_rate=rate, metrics=judged.metrics(table.pass_at_k)))
    return tuple(trials)


def best_trial(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the best pass rate; of equal ones, the one with the lowest temperature."""
    return max(trials, key=lambda trial: (trial.pass_rate, -trial.table.temperature))
