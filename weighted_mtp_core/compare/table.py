"""The tables of a comparison: overview, gap, cost, and for each metric the differences from the first arm."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import asdict, field, frozen

from weighted_mtp_core.compare.cost import cost_section, median_costs
from weighted_mtp_core.compare.gap import ClosedGap, Gap, closed_gaps, gap_section
from weighted_mtp_core.compare.measures import RunMeasures
from weighted_mtp_core.metrics.statistics import Difference, Estimate, difference, estimate, smallest_p

EQUAL_STEPS = "equal steps"
EQUAL_TIME = "equal wall clock"
_NONE = "-"


@frozen(kw_only=True)
class Row:
    """One row of the table: one metric of one arm.

    Attributes:
        metric: Name of the metric.
        at: `equal steps` or `equal wall clock`.
        arm: Name of the arm.
        values: The values, keyed by seed.
        estimate: Mean and interval over the seeds.
        difference: Difference from the first arm over the seeds that both arms have; None for the first arm
            and for arms without a common seed.
    """

    metric: str
    at: str
    arm: str
    values: Mapping[int, float]
    estimate: Estimate
    difference: Difference | None


@frozen(kw_only=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        arms: Names of the arms; the first is the baseline.
        seeds: Seeds of the runs.
        seconds: Duration of stage 2 in the fastest run; at equal wall clock, runs are compared at this time.
        count: Number of runs.
        rows: The rows of the table, in order.
        missing: A line for each run that did not finish.
        diverged: A line for each value that is not finite.
        uneven: For each arm, a line with its numbers of steps; empty if all runs have the same number.
        machines: A line for each kind of machine that executed runs, if there are several kinds.
        few: Lines on the arms with a run that has fewer than three validations, without step 0, up to
            `seconds`.
        gap: The arms that are the floor and the ceiling; None if the user names no such arms.
        closed: The share of the gap that each other arm closes, by metric.
        cost: The cost of stage 2 for each arm, as medians over the seeds, see `median_costs`.
    """

    arms: Sequence[str]
    seeds: Sequence[int]
    seconds: float
    count: int
    rows: Sequence[Row]
    missing: Sequence[str] = ()
    diverged: Sequence[str] = ()
    uneven: Sequence[str] = ()
    machines: Sequence[str] = ()
    few: Sequence[str] = ()
    gap: Gap | None = None
    closed: Sequence[ClosedGap] = ()
    cost: Mapping[str, Mapping[str, float]] = field(factory=dict)

    @classmethod
    def make(
        cls,
        runs: Mapping[str, Mapping[int, RunMeasures]],
        *,
        metrics: Sequence[str],
        seeds: Sequence[int],
        missing: Sequence[str] = (),
        machines: Sequence[str] = (),
        gap: Gap | None = None,
    ) -> Comparison:
        """Compare runs, keyed by arm and seed, by metrics at equal steps and curves at equal wall clock."""
        everything = [run for by_seed in runs.values() for run in by_seed.values()]
        seconds = min(run.policy_seconds for run in everything)
        rows: list[Row] = []
        few: dict[str, None] = {}
        for metric in metrics:
            last = {arm: {s: run.last.get(metric) for s, run in each.items()} for arm, each in runs.items()}
            rows += _rows(metric, EQUAL_STEPS, last)
        for metric in metrics:
            if all(metric in run.curves for run in everything):
                after = {
                    arm: {s: run.at_seconds(metric, seconds) for s, run in each.items()}
                    for arm, each in runs.items()
                }
                rows += _rows(metric, EQUAL_TIME, after)
                few |= dict.fromkeys(_few_validations(runs, metric, seconds))
        return cls(
            arms=tuple(runs),
            seeds=seeds,
            seconds=seconds,
            count=len(everything),
            rows=rows,
            missing=missing,
            machines=machines,
            diverged=_diverged(rows),
            uneven=_uneven(runs),
            few=tuple(few),
            gap=gap,
            closed=() if gap is None else _closed(gap, rows),
            cost=median_costs(runs),
        )

    def markdown(self) -> str:
        """Return a Markdown page: an overview with notes, gap and cost, then the tables of each metric."""
        parts = ["# Comparison", "", *self._overview(), "", *self._explanation()]
        parts += [] if self.gap is None else gap_section(self.gap, self.closed)
        parts += cost_section(self.cost)
        shown = ("", "")
        for row in self.rows:
            if (row.metric, row.at) != shown:
                shown = (row.metric, row.at)
                parts += ["", f"## `{row.metric}`, at {row.at}", "", _HEAD, _RULE]
            parts.append(_line(row))
        return "\n".join(parts) + "\n"

    def json(self) -> str:
        """Return the comparison as JSON, with each seed's values; numbers that are not finite are null."""
        table = asdict(self, value_serializer=lambda _, __, value: _plain(value))
        return json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def csv(self) -> str:
        """Return the rows as CSV."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for row in self.rows:
            mine, theirs = row.estimate, row.difference
            other = theirs.estimate if theirs else None
            writer.writerow(
                [
                    *(row.metric, row.at, row.arm, mine.count),
                    *map(_cell, (mine.mean, mine.low, mine.high)),
                    *(map(_cell, (other.mean, other.low, other.high)) if other else ("", "", "")),
                    _cell(theirs.p_value) if theirs else "",
                ]
            )
        return text.getvalue()

    def _overview(self) -> list[str]:
        """Return a Markdown table of arms and metrics at equal steps, with columns aligned by blanks."""
        rows = [row for row in self.rows if row.at == EQUAL_STEPS]
        metrics = list(dict.fromkeys(row.metric for row in rows))
        table = [["arm", "seeds", *metrics]]
        for arm in self.arms:
            found = {row.metric: row.estimate for row in rows if row.arm == arm}
            seeds = max((each.count for each in found.values()), default=0)
            cells = [_plus_minus(found[metric], seeds) if metric in found else _NONE for metric in metrics]
            table.append([f"`{arm}`", str(seeds), *cells])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        table.insert(1, ["-" * width for width in widths])
        lines = [f"| {' | '.join(map(str.ljust, cells, widths))} |" for cells in table]
        return [*lines, "", "Mean ± half the width of the 95 % interval, at equal steps."]

    def _explanation(self) -> list[str]:
        count = len(self.seeds)
        several = "s" * (count > 1)
        what = (
            f"{len(self.arms)} arms, {count} seed{several} ({', '.join(map(str, self.seeds))}). "
            f"Differences are from `{self.arms[0]}`, paired by seed; intervals are 95 % (Student's t over "
            "seeds); p is from the exact two-sided sign-flip test, not corrected for the number of rows. "
            f"With {count} pair{several} it cannot be below {smallest_p(count):.4g}."
        )
        when = (
            "At equal steps: the last value of each run. At equal wall clock: the value after "
            f"{self.seconds:.1f} s of stage 2, the duration of the fastest run."
        )
        lines = [what, "", when]
        if self.missing:
            lines += ["", "**Incomplete**, because these runs failed:", ""]
            lines += [f"- {each}" for each in self.missing]
        if self.uneven:
            lines += ["", "**Unequal steps**: rows at equal steps compare the ends of these runs:", ""]
            lines += [f"- {each}" for each in self.uneven]
        if self.machines:
            why = "rows at equal wall clock compare their speeds, and all values also differ by rounding:"
            lines += ["", f"**Several kinds of machines**: {why}", ""]
            lines += [f"- {each}" for each in self.machines]
        if self.diverged:
            lines += ["", "**Diverged**: these values are not finite, so their arms have no mean:", ""]
            lines += [f"- {each}" for each in self.diverged]
        if self.few:
            lines += [
                "",
                "**Rough**: few validations, between which values at equal wall clock are interpolated ",
            ]
            lines[-1] += f"(fewer than {_ENOUGH_VALIDATIONS}; lower `train.validate_every`):"
            lines += [""]
            lines += [f"- {each}" for each in self.few]
        return lines


_ENOUGH_VALIDATIONS = 3
_COLUMNS = (
    *("metric", "at", "arm", "seeds", "mean", "low", "high"),
    *("difference", "difference_low", "difference_high", "p_value"),
)
_HEAD = "| arm | seeds | mean | 95 % interval | difference | 95 % interval | p |"
_RULE = "|---|---|---|---|---|---|---|"


def _rows(metric: str, at: str, values: Mapping[str, Mapping[int, float | None]]) -> list[Row]:
    found = {
        arm: {seed: value for seed, value in by_seed.items() if value is not None}
        for arm, by_seed in values.items()
    }
    first = next(iter(found))
    return [
        Row(
            metric=metric,
            at=at,
            arm=arm,
            values=values,
            estimate=estimate(tuple(values.values())),
            difference=None if arm == first else _paired(values, found[first]),
        )
        for arm, values in found.items()
        if values
    ]


def _closed(gap: Gap, rows: Sequence[Row]) -> tuple[ClosedGap, ...]:
    values: dict[str, dict[str, Mapping[int, float]]] = {}
    for row in rows:
        if row.at == EQUAL_STEPS:
            values.setdefault(row.metric, {})[row.arm] = row.values
    return tuple(each for metric, by_arm in values.items() for each in closed_gaps(gap, metric, by_arm))


def _uneven(runs: Mapping[str, Mapping[int, RunMeasures]]) -> tuple[str, ...]:
    """Return for each arm a line with its numbers of steps; empty if all runs have the same number."""
    by_arm = {arm: sorted({run.steps for run in by_seed.values()}) for arm, by_seed in runs.items()}
    if len({steps for found in by_arm.values() for steps in found}) == 1:
        return ()
    return tuple(
        f"`{arm}`: {found[0]} steps" if len(found) == 1 else f"`{arm}`: {found[0]} to {found[-1]} steps"
        for arm, found in by_arm.items()
    )


def _few_validations(
    runs: Mapping[str, Mapping[int, RunMeasures]], metric: str, seconds: float
) -> Iterator[str]:
    for arm, by_seed in runs.items():
        found = min(run.validations_until(metric, seconds) for run in by_seed.values())
        if found < _ENOUGH_VALIDATIONS:
            yield f"`{arm}`: {found} validation{'s' * (found != 1)} after the start"


def _diverged(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(
        f"`{row.metric}` at {row.at}: `{row.arm}`, seed {seed}"
        for row in rows
        for seed, value in row.values.items()
        if not math.isfinite(value)
    )


def _paired(arm: Mapping[int, float], first: Mapping[int, float]) -> Difference | None:
    common = [seed for seed in arm if seed in first]
    if not common:
        return None
    return difference([arm[seed] for seed in common], [first[seed] for seed in common])


def _line(row: Row) -> str:
    other = row.difference
    mean = "diverged" if math.isnan(row.estimate.mean) else f"{row.estimate.mean:.4g}"
    cells = [f"`{row.arm}`", str(row.estimate.count), mean, _interval(row.estimate)]
    if other is None or math.isnan(other.estimate.mean):
        cells += [_NONE, _NONE, _NONE]
    else:
        cells += [f"{other.estimate.mean:+.4g}", _interval(other.estimate), f"{other.p_value:.4g}"]
    return f"| {' | '.join(cells)} |"


def _plus_minus(found: Estimate, seeds: int) -> str:
    """Return mean ± half width of the interval, both rounded to two significant digits of the half width.

    Neither is rounded more coarsely than to an integer. A mean that is NaN gives `diverged`, and a mean
    without an interval is returned alone. If the mean is over fewer than `seeds` seeds, the number of its
    seeds follows in parentheses.
    """
    if found.count < seeds:
        own = _plus_minus(found, found.count)
        return f"{own} ({found.count} seed{'s' * (found.count > 1)})"
    if math.isnan(found.mean):
        return "diverged"
    half = (found.high - found.low) / 2
    if math.isnan(half) or half == 0:
        return f"{found.mean:.4g}" + " ± 0" * (half == 0)
    places = max(0, 1 - math.floor(math.log10(half)))
    return f"{found.mean:.{places}f} ± {half:.{places}f}"


def _interval(found: Estimate) -> str:
    return _NONE if math.isnan(found.low) else f"[{found.low:.4g}, {found.high:.4g}]"


def _cell(value: float) -> float | str:
    return "" if math.isnan(value) else value


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
