"""What a finished run measured, read from its journal: last values, curves, and how long training took."""

from __future__ import annotations

import re
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import field, frozen

from weighted_mtp_core.tracking.journal import Entry, read_journal
from weighted_mtp_core.tracking.run_folder import RunFolder

_DEFAULT = re.compile(
    r"pass_at_\d+.*|(test|validation)_ce_head_\d+|tokens_per_forward|(policy|critic)_seconds"
)
_CURVE = re.compile(r"validation_.+")


@frozen(kw_only=True)
class Measures:
    """What is compared of one run.

    Attributes:
        last: The last value of every metric, and `policy_seconds` and `critic_seconds`.
        curves: By metric of stage 2's validation, its (step, value) in order.
        step_seconds: How long a step of stage 2 took.
    """

    last: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    step_seconds: float

    @property
    def policy_seconds(self) -> float:
        """How long stage 2 took."""
        return self.last["policy_seconds"]

    def at_seconds(self, metric: str, seconds: float) -> float:
        """Return a curve's value after so many seconds of stage 2, on the line between two validations."""
        return _on_line(self.curves[metric], seconds / self.step_seconds)


@frozen(kw_only=True)
class _Clock:
    """When the steps of one stage were logged: (step, seconds since 1970)."""

    lines: list[tuple[int, float]] = field(factory=list)

    @property
    def step_seconds(self) -> float:
        """Seconds a step: the median between two lines, which neither a validation nor a pause moves."""
        rates = [
            (later[1] - earlier[1]) / (later[0] - earlier[0])
            for earlier, later in zip(self.lines, self.lines[1:], strict=False)
            if later[0] > earlier[0]
        ]
        return statistics.median(rates) if rates else 0.0

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return self.step_seconds * self.lines[-1][0] if self.lines else 0.0


def read_measures(run: Path) -> Measures:
    """Read the journal of a run folder; values that are not finite are left out."""
    last: dict[str, float] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    clocks = {"critic": _Clock(), "policy": _Clock()}
    for entry in read_journal(RunFolder(path=run).journal, kinds=("metrics",)):
        if not isinstance(entry, Entry):
            continue
        step, stage = entry.fields["step"], entry.fields["stage"]
        values = {
            name: value for name, value in entry.fields["metrics"].items() if not isinstance(value, str)
        }
        last |= values
        if f"{stage}_learning_rate" in values:  # what the loop logs, as opposed to a validation
            clocks[stage].lines.append((step, entry.time_ms / 1000))
        if stage == "policy":
            for name in filter(_CURVE.fullmatch, values):
                curves.setdefault(name, []).append((step, values[name]))
    last |= {f"{stage}_seconds": clock.seconds for stage, clock in clocks.items()}
    return Measures(last=last, curves=curves, step_seconds=clocks["policy"].step_seconds)


def default_metrics(runs: Sequence[Measures]) -> list[str]:
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
