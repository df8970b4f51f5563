"""What a finished run measured, read from its journal: last values, curves, and how long training took."""

from __future__ import annotations

import math
import re
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from attrs import frozen

from weighted_mtp_core.tracking.journal import Entry, read_journal
from weighted_mtp_core.tracking.run_folder import RunFolder

_DEFAULT = re.compile(
    r"pass_at_\d+.*|(test|validation)_ce_head_\d+|tokens_per_forward|(policy|critic)_seconds"
)
_EACH_LOGGED_STEP = "_learning_rate"  # what the loop logs with every line, as opposed to a validation
_CURVE = re.compile(r"validation_.+")


Point = tuple[int, float, float]
"""A step, a value, and when it was measured, in seconds."""


@frozen(kw_only=True)
class RunMeasures:
    """What is compared of one run.

    Attributes:
        last: The last value of every metric, and `policy_seconds` and `critic_seconds`.
        curves: By metric of stage 2's validation, its (step, value) in order.
        step_seconds: How long a step of stage 2 took.
    """

    last: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    step_seconds: float

    @classmethod
    def make(cls, series: Mapping[str, Sequence[Point]]) -> RunMeasures:
        """Digest all points of a run, by metric and in order."""
        last = {name: points[-1][1] for name, points in series.items()}
        for stage in ("policy", "critic"):
            points = series.get(f"{stage}{_EACH_LOGGED_STEP}", ())
            last[f"{stage}_seconds"] = _step_seconds(points) * points[-1][0] if points else 0.0
        return cls(
            last=last,
            curves={
                name: [(step, value) for step, value, _ in points]
                for name, points in series.items()
                if _CURVE.fullmatch(name)
            },
            step_seconds=_step_seconds(series.get(f"policy{_EACH_LOGGED_STEP}", ())),
        )

    @property
    def policy_seconds(self) -> float:
        """How long stage 2 took."""
        return self.last["policy_seconds"]

    def at_seconds(self, metric: str, seconds: float) -> float:
        """Return a curve's value after so many seconds of stage 2, on the line between two validations."""
        step = seconds / self.step_seconds if self.step_seconds else math.inf
        return _on_line(self.curves[metric], step)


def read_measures(run: Path) -> RunMeasures:
    """Read the journal of a run folder; values that are not finite are left out."""
    series: dict[str, list[Point]] = {}
    for entry in read_journal(RunFolder(path=run).journal, kinds=("metrics",)):
        if isinstance(entry, Entry):
            for name, value in entry.fields["metrics"].items():
                if not isinstance(value, str):
                    series.setdefault(name, []).append((entry.fields["step"], value, entry.time_ms / 1000))
    return RunMeasures.make(series)


def _step_seconds(points: Sequence[Point]) -> float:
    """Return seconds a step: the median between two lines, which neither a validation nor a pause moves."""
    rates = [
        (later[2] - earlier[2]) / (later[0] - earlier[0])
        for earlier, later in pairwise(points)
        if later[0] > earlier[0]
    ]
    return statistics.median(rates) if rates else 0.0


def default_metrics(runs: Sequence[RunMeasures]) -> list[str]:
    """Return the metrics that every run has and a comparison is about, pass@k first."""
    common = set.intersection(*(set(run.last) for run in runs))
    order = ("pass_at", "test_ce", "validation_ce", "tokens_per", "policy_s", "critic_s")
    found = sorted(filter(_DEFAULT.fullmatch, common), key=lambda name: (_number(name), name))
    return sorted(found, key=lambda name: next(i for i, each in enumerate(order) if name.startswith(each)))


def _number(name: str) -> int:
    digits = re.search(r"\d+", name)
    return int(digits[0]) if digits else 0


def _on_line(points: Sequence[tuple[int, float]], step: float) -> float:
    after = bisect_right([each[0] for each in points], step + 1e-9)
    if after == len(points):
        return points[-1][1]
    if after == 0:
        return points[0][1]
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return y0 + (y1 - y0) * (step - x0) / (x1 - x0)
