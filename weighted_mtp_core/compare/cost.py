"""The section on cost in the page of a comparison: speed and memory of stage 2 for each arm."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from weighted_mtp_core.compare.measures import RunMeasures

_COLUMNS = {
    "seconds": ("seconds", "{:.1f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "flops_per_second": ("GFLOP/s", "{:,.1f}"),
    "matrix_rate_share": ("share of the matrix rate", "{:.2f}"),
    "peak_host_memory": ("peak memory, MB", "{:,.0f}"),
    "peak_device_memory": ("peak on the device, MB", "{:,.0f}"),
}
_EXPLANATION = (
    "Stage 2, medians over the seeds. The matrix rate is the rate of a large matrix product, measured before "
    "the stage. The peak memory is that of the largest process: on the host since the process started, on "
    "the device in stage 2. Runs that execute at once slow each other down."
)


def median_costs(runs: Mapping[str, Mapping[int, RunMeasures]]) -> dict[str, dict[str, float]]:
    """Return for each arm the medians over its seeds of `RunMeasures.cost` and of the seconds of stage 2.

    A measure that no seed of an arm has is left out.
    """
    found: dict[str, dict[str, float]] = {}
    for arm, by_seed in runs.items():
        costs = [{"seconds": run.policy_seconds, **run.cost} for run in by_seed.values()]
        found[arm] = {
            name: statistics.median(each[name] for each in costs if name in each)
            for name in _COLUMNS
            if any(name in each for each in costs)
        }
    return found


def cost_section(costs: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
    """Return the Markdown lines of the section on cost; columns without values are left out.

    Without any value, there are no lines.
    """
    columns = [name for name in _COLUMNS if any(name in each for each in costs.values())]
    if not columns:
        return ()
    lines = ["", "## Cost", "", _EXPLANATION, ""]
    lines.append(f"| arm | {' | '.join(_COLUMNS[name][0] for name in columns)} |")
    lines.append(f"|---{'|---' * len(columns)}|")
    for arm, found in costs.items():
        cells = [_cell(name, found.get(name)) for name in columns]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return lines


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return _COLUMNS[name][1].format(value / 1e9 if name == "flops_per_second" else value)
