"""Compute how much of the gap between two arms, a floor and a ceiling, the other arms close."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from attrs import frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import did_you_mean, quoted
from weighted_mtp_core.metrics.statistics import Estimate, ratio


@frozen(kw_only=True)
class Gap:
    """The floor and the ceiling of a comparison: two arms between which other arms are placed.

    Attributes:
        floor: Name of the arm that any other arm should beat.
        ceiling: Name of the arm that is an upper bound, such as an oracle.
    """

    floor: str
    ceiling: str

    @classmethod
    def of(cls, floor: str | None, ceiling: str | None, *, arms: Sequence[str]) -> Gap | None:
        """Return the gap between two arms; None if neither arm is named.

        Raises:
            WmtpError: Only one of the two arms is named, floor and ceiling are the same arm, or a name is not
                the name of an arm.
        """
        if floor is None and ceiling is None:
            return None
        if floor is None or ceiling is None or floor == ceiling:
            raise WmtpError("`--floor` and `--ceiling` belong together and must name two different arms")
        for option, name in (("--floor", floor), ("--ceiling", ceiling)):
            if name not in arms:
                hint = did_you_mean(name, arms) or f"the arms are {quoted(arms)}"
                raise WmtpError(f"`{option} {name}` does not name an arm", hint=hint)
        return cls(floor=floor, ceiling=ceiling)


@frozen(kw_only=True)
class ClosedGap:
    """The share of a gap that an arm closes: (arm - floor) / (ceiling - floor), paired by seed.

    Attributes:
        metric: Name of the metric.
        arm: Name of the arm.
        share: Ratio of the mean differences, with Fieller's interval. The ends of the interval are NaN if the
            interval cannot be computed, for example because the gap does not differ significantly from 0. The
            ratio is NaN, too, if a value is not finite or the mean gap is 0.
    """

    metric: str
    arm: str
    share: Estimate


def closed_gaps(gap: Gap, metric: str, values: Mapping[str, Mapping[int, float]]) -> Iterator[ClosedGap]:
    """Yield the share of the gap that each arm closes, over the seeds that it shares with floor and ceiling.

    An arm without such a seed is left out.

    Args:
        gap: The floor and the ceiling, for which no share is computed.
        metric: Name of the metric.
        values: The values of the metric by arm and seed.
    """
    low, high = values.get(gap.floor, {}), values.get(gap.ceiling, {})
    for arm, own in values.items():
        common = [seed for seed in own if seed in low and seed in high]
        if arm in {gap.floor, gap.ceiling} or not common:
            continue
        part = [own[seed] - low[seed] for seed in common]
        whole = [high[seed] - low[seed] for seed in common]
        yield ClosedGap(metric=metric, arm=arm, share=ratio(part, whole))


def gap_section(gap: Gap, rows: Sequence[ClosedGap]) -> list[str]:
    """Return the Markdown lines of the section on the gap; an empty list if there are no rows."""
    if not rows:
        return []
    explanation = (
        f"(arm - `{gap.floor}`) / (`{gap.ceiling}` - `{gap.floor}`), at equal steps, paired by seed: 0 is as "
        f"good as `{gap.floor}`, 1 as good as `{gap.ceiling}`. The interval is Fieller's 95 % interval of a "
        "ratio of means; there is none if the gap itself may be 0."
    )
    return [
        "",
        f"## Share of the gap from `{gap.floor}` to `{gap.ceiling}`",
        "",
        explanation,
        "",
        "| metric | arm | seeds | share | 95 % interval |",
        "|---|---|---|---|---|",
        *(_line(row) for row in rows),
    ]


def _line(row: ClosedGap) -> str:
    share = row.share
    interval = "-" if math.isnan(share.low) else f"[{share.low:.3g}, {share.high:.3g}]"
    mean = "-" if math.isnan(share.mean) else f"{share.mean:.3g}"
    return f"| `{row.metric}` | `{row.arm}` | {share.count} | {mean} | {interval} |"
