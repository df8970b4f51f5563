"""What all benchmarks share: arms in turns in one process, ratios with their spread, peaks from the kernel.

Shared machines are noisy, and most of the noise lasts longer than one repetition. So the arms of a comparison
take turns, each round gives one ratio, and a row reports the median of those. The time is CPU time on one
thread; wall time is measured beside it. A peak is what the kernel counted in a process that did nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, define, evolve, field, frozen

MIB = 1 << 20
IDLE_LOAD = 1.2  # of two cores; the benchmark's own thread counts 1 of it


@frozen(kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: What was measured.
        value: The median.
        reach: The limit, with its direction: `<= 1.3`; empty for what is only reported.
        ok: Whether the value is within it; None without one.
        spread: First and third quartile over the rounds; the value twice where it was taken once.
        unit: Of value and spread; `x` for ratios.
        wall: The same by the clock, where `value` is of CPU time.
        note: What one must know to read it.
    """

    name: str
    value: float
    reach: str
    ok: bool | None
    spread: tuple[float, float]
    unit: str
    wall: float | None = None
    note: str = ""


@define(kw_only=True)
class Times:
    """Seconds of each round of an arm."""

    cpu: list[float] = field(factory=list)
    wall: list[float] = field(factory=list)


def in_turns(arms: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, Times]:
    """Run each arm once a round, in an order that rotates from round to round; return their times."""
    names = list(arms)
    times = {name: Times() for name in names}
    for turn in range(-warmup, rounds):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            wall, cpu = time.perf_counter(), time.process_time()
            arms[name]()
            if turn >= 0:
                times[name].cpu.append(time.process_time() - cpu)
                times[name].wall.append(time.perf_counter() - wall)
    return times


def ratio_row(
    name: str, over: Times, under: Times, *, reach: str = "", scale: float = 1.0, note: str = ""
) -> Row:
    """Return the row of one arm's time over another's, multiplied by `scale`."""
    ratios = [scale * a / b for a, b in zip(over.cpu, under.cpu, strict=True)]
    walls = [scale * a / b for a, b in zip(over.wall, under.wall, strict=True)]
    return row(name, ratios, reach=reach, unit="x", wall=statistics.median(walls), note=note)


def row(
    name: str,
    values: Sequence[float],
    *,
    reach: str = "",
    unit: str,
    wall: float | None = None,
    note: str = "",
) -> Row:
    """Return the row of several measurements of one thing."""
    value = statistics.median(values)
    first, _, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    ok = within(value, reach) if reach else None
    return Row(
        name=name, value=value, reach=reach, ok=ok, spread=(first, third), unit=unit, wall=wall, note=note
    )


def within(value: float, reach: str) -> bool:
    """Say whether a value is within a limit such as `<= 1.3` or `>= 300`."""
    sign, limit = reach.split()
    return value <= float(limit) if sign == "<=" else value >= float(limit)


def peak_mib(prepare: Callable[..., Callable[[], object]], *arguments: object) -> float:
    """Return by how much a process of its own grew at most while it ran what `prepare(*arguments)` returns.

    Args:
        prepare: A function of a module, for the new process finds it by name; makes the inputs, which do not
            count, and returns what is measured.
        arguments: Plain values.

    Returns:
        MiB of resident memory above those that the inputs take.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_grown, prepare, arguments).result()


def _grown(prepare: Callable[..., Callable[[], object]], arguments: Sequence[object]) -> float:
    """Measure in this process; `clear_refs` sets the kernel's peak back to what is resident now."""
    torch.set_num_threads(1)
    measured = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    measured()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """Return a figure of this process, in KiB; `ru_maxrss` would begin with the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def machine() -> dict[str, Any]:
    """Describe where and how quietly this is measured."""
    load = os.getloadavg()[0]
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpus[0].partition(": ")[2] if cpus else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_before": round(load, 2),
        "idle": load < IDLE_LOAD,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    lines = ["| what | median | quartiles | by the clock | reach | |", "|---|---|---|---|---|---|"]
    for each in rows:
        first, third = each["spread"]
        wall = "" if each["wall"] is None else f"{each['wall']:.4g}"
        verdict = {True: "ok", False: "**missed**", None: ""}[each["ok"]]
        note = f" ({each['note']})" if each["note"] else ""
        lines.append(
            f"| {each['name']}{note} | {each['value']:.4g} {each['unit']} | {first:.4g} to {third:.4g} "
            f"| {wall} | {each['reach']} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def run_group(measure: Callable[[argparse.Namespace], list[Row]], description: str | None) -> int:
    """Run one group alone: parse its arguments, measure, print; return 1 if a row misses its reach.

    `--quick` shrinks everything until it only shows that the code runs; `--json FILE` keeps the rows.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write machine and rows to FILE")
    parser.add_argument("--run", metavar="FOLDER", type=Path, help="a finished run, where one is needed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where = machine()
    began = time.perf_counter()
    measured = measure(args)
    rows = [asdict(evolve(each, ok=None) if args.quick else each) for each in measured]
    found = {"machine": where, "seconds": round(time.perf_counter() - began, 1), "rows": rows}
    print(f"load {where['load_before']} on {where['cores']} cores, {found['seconds']} s")
    print(table(rows), end="")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(each["ok"] is False for each in rows))


def main(measure: Callable[[argparse.Namespace], list[Row]], description: str | None) -> None:
    """Be the program of one group."""
    sys.exit(run_group(measure, description))
