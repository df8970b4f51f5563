"""The measures of a finished run that are compared, such as last values, curves, durations and cost."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from attrs import frozen

from weighted_mtp_core.tracking.run_folder import read_run
from weighted_mtp_core.tracking.run_history import Point, read_history
from weighted_mtp_core.training.stage_cost import cost_of

_DEFAULT = re.compile(
    r"pass_at_\d+.*|(test|validation)_ce_head_\d+(_of_\d+_examples)?|tokens_per_forward|(policy|critic)_seconds"
)
_EACH_LOGGED_STEP = "_learning_rate"  # a metric that is logged for training steps, but not for validations
_CURVE = re.compile(r"validation_.+")


@frozen(kw_only=True)
class RunMeasures:
    """The measures of one run that are compared.

    Attributes:
        last: The last value of every metric and of every measurement of time or memory, and the durations
            `policy_seconds` and `critic_seconds`; NaN for a metric that has no value at the last record or
            validation of stage 2, because the value was not finite.
        curves: The points (step, value) of each validation metric of stage 2, in order of steps.
        step_seconds: Median duration of a step of stage 2, in seconds; 0 if it is not known.
        cost: The cost of stage 2, see `cost_of`.
        steps: Number of steps of stage 2; 0 if it is not known.
    """

    last: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    step_seconds: float
    cost: Mapping[str, float]
    steps: int = 0

    @classmethod
    def make(cls, series: Mapping[str, Sequence[Point]]) -> RunMeasures:
        """Make the measures of a run from its points, keyed by metric and in order."""
        last = {name: points[-1].value for name, points in series.items()}
        validated = {name: points for name, points in series.items() if _CURVE.fullmatch(name)}
        of_stages = {"policy": [*chain(*validated.values())], "critic": series.get("critic_auc", ())}
        step_seconds = {}
        for stage, validations in of_stages.items():
            points = series.get(f"{stage}{_EACH_LOGGED_STEP}", ())
            step_seconds[stage] = _step_seconds(points, validations)
            last[f"{stage}_seconds"] = step_seconds[stage] * points[-1].step if points else 0.0
        curves = {name: [(point.step, point.value) for point in points] for name, points in validated.items()}
        # Stage 2 ends with a validation, and MLflow contains only finite values. So if a curve has no value
        # at the last step, the last value was not finite.
        logged = series.get(f"policy{_EACH_LOGGED_STEP}", ())
        for name, curve in curves.items():
            if logged and curve[-1][0] < logged[-1].step:
                curve.append((logged[-1].step, math.nan))
                last[name] = math.nan
        # The same is true for a metric that was recorded together with the learning rate, but not at the end.
        records = {(point.step, point.time_ms) for point in logged[:-1]}
        for name, points in series.items():
            if (points[-1].step, points[-1].time_ms) in records:
                last[name] = math.nan
        return cls(
            last=last,
            curves=curves,
            step_seconds=step_seconds["policy"],
            cost=cost_of("policy", series),
            steps=logged[-1].step if logged else 0,
        )

    @property
    def policy_seconds(self) -> float:
        """Median duration of a step of stage 2, in seconds, times the number of steps."""
        return self.last["policy_seconds"]

    def validations_until(self, metric: str, seconds: float) -> int:
        """Return the number of a curve's values, without step 0, in the first `seconds` of stage 2."""
        return sum(0 < step * self.step_seconds <= seconds * (1 + 1e-9) for step, _ in self.curves[metric])

    def at_seconds(self, metric: str, seconds: float) -> float:
        """Return the value of a curve after `seconds` of stage 2, interpolated between two validations."""
        step = seconds / self.step_seconds if self.step_seconds else math.inf
        steps, values = zip(*self.curves[metric], strict=True)
        return float(np.interp(step, steps, values))


def read_measures(run: Path) -> RunMeasures:
    """Read the measures of a run from its folder."""
    history = read_history(run)
    series = dict(history.timings)
    for metrics in history.metrics.values():
        for name, points in metrics.items():
            series.setdefault(name, []).extend(points)
    return RunMeasures.make(series)


def kinds_of_machines(runs: Iterable[Path]) -> list[str]:
    """Return a line for each kind of machine that executed runs; empty if all machines are of one kind."""
    kinds = Counter(
        ", ".join(f"{key} {value}" for key, value in read_run(run).get("fingerprint", {}).items())
        for run in runs
    )
    if len(kinds) < 2:
        return []
    return [f"{count} run{'s' * (count > 1)}: {kind or 'unknown'}" for kind, count in kinds.most_common()]


def _step_seconds(logged: Sequence[Point], validations: Sequence[Point]) -> float:
    """Return the median of the seconds per step, because pauses would affect the mean; 0 without intervals.

    Validations are excluded: each interval ends at a logged step, and begins at the logged step or at the end
    of the validation before it, whichever is later. A step is logged before its validation.
    """
    events = [(point.time_ms, point.step, False) for point in logged]
    events += [(point.time_ms, point.step, True) for point in validations]
    rates = [
        (later - earlier) / 1000 / (step - before)
        for (earlier, before, _), (later, step, is_validation) in pairwise(sorted(events))
        if step > before and not is_validation
    ]
    return statistics.median(rates) if rates else 0.0


def default_metrics(runs: Sequence[RunMeasures]) -> list[str]:
    """Return the default metrics of a comparison that every run has; pass@k comes first."""
    common = set.intersection(*(set(run.last) for run in runs))
    order = ("pass_at", "test_ce", "validation_ce", "tokens_per", "policy_s", "critic_s")
    found = sorted(filter(_DEFAULT.fullmatch, common), key=lambda name: (_number(name), name))
    return sorted(found, key=lambda name: next(i for i, each in enumerate(order) if name.startswith(each)))


def _number(name: str) -> int:
    digits = re.search(r"\d+", name)
    return int(digits[0]) if digits else 0
