"""Formats the output of `check --memory`.

The output consists of a headline, a table of the memory that each phase of a run needs, lines that say
whether this memory is available, and a table of the recipe keys that reduce the peak.
"""

from __future__ import annotations

from collections.abc import Sequence

from weighted_mtp_core.memory.fit import TOLERANCE
from weighted_mtp_core.memory.forecast import Forecast, size
from weighted_mtp_core.memory.parts import COPIES, PARTS, Phase
from weighted_mtp_core.memory.savings import Saving

Row = tuple[str, ...]


def headline(found: Forecast) -> str:
    """Return a line with the device, the processes, the dtype, the parameters and the rows of a forecast."""
    rows, tokens = found.rows
    target = found.target
    processes = "1 process" if target.processes == 1 else f"{target.processes} processes"
    dtype = str(target.dtype).removeprefix("torch.")
    return (
        f"memory of each process on `{target.device}` ({processes}, {dtype}): {found.parameters / 1e6:.1f} M "
        f"parameters, {rows} x {tokens} tokens at a time"
    )


def phase_rows(phases: Sequence[Phase]) -> list[Row]:
    """Return the table of the phases: a column for each phase, a row for each part of memory, and totals."""
    if not phases:
        return []
    rows: list[Row] = [("", *(phase.name for phase in phases))]
    rows += [
        (part, *(size(phase.parts[part]) if phase.parts.get(part) else "" for phase in phases))
        for part in (*PARTS, COPIES)
        if any(phase.parts.get(part) for phase in phases)
    ]
    return [*rows, ("total", *(size(phase.total) for phase in phases))]


def verdict(name: str, needed: int, free: int | None, *, complete: bool = True) -> str:
    """Return a line on whether `needed` bytes fit into `free` bytes of the memory `name`.

    If the forecast is not complete, the run needs more than `needed` bytes.
    """
    if not complete:
        return f"{name}: more than {size(needed)}" + ("" if free is None else f" of {size(free)}")
    if free is None:
        return f"{name}: {size(needed)}"
    if needed > free:
        may = "; it may fit" if needed * (1 - TOLERANCE) <= free else ""
        return f"{name}: {size(needed)} of {size(free)}, {size(needed - free)} too much{may}"
    return f"{name}: {size(needed)} of {size(free)}, fits"


def saving_rows(found: Sequence[Saving], peak: int) -> list[Row]:
    """Return a row for each change of a key that lowers the peak; `peak` is the peak before the change."""
    return [
        (
            each.change,
            f"-{size(each.saved)}",
            f"to {size(peak - each.saved)}",
            "same result" if each.same_result else "",
        )
        for each in found
    ]
