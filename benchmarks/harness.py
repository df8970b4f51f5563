"""Shared code of the benchmarks: interleaved timing, ratios with quartiles, peak memory from the kernel.

Shared machines are noisy, and most of the noise lasts longer than one repetition. So the variants of a
comparison take turns in one process, each round gives one ratio, and a row reports the median of the ratios.
Most times are CPU times on one thread; wall times are recorded as well. Peak memory is measured in a separate
process.

`bench.py --gpu` measures on a CUDA device instead. Times are then elapsed times until the device has
finished, and peak memory is the memory that torch has allocated on the device. Limits are not checked,
because all limits are for CPUs.
"""

from __future__ import annotations

import argparse
import ctypes
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
QUICK = "WMTP_BENCH_QUICK"  # variable that `--quick` sets
GPU = "WMTP_BENCH_GPU"  # variable that `bench.py --gpu` sets
IDLE_LOAD = 1.2  # largest load average that counts as idle; the benchmark's previous group adds up to 1
_M_MMAP_THRESHOLD = -3  # from glibc's malloc.h
_SMALL_BLOCK = 1 << 16  # bytes


@frozen(kw_only=True)
class Row:
    """One row of the table.

    Attributes:
        name: What was measured.
        value: Median over the rounds.
        limit: The limit with its direction, for example `<= 1.3`; empty if there is no limit.
        ok: Whether the value is within the limit; None if there is no limit or limits are not checked.
        spread: First and third quartile over the rounds; both equal the value if there is only one round.
        unit: Unit of value and spread; `x` for ratios.
        wall: The median from wall times, for some rows whose `value` comes from CPU times; otherwise None.
        note: A remark that helps to understand the row.
    """

    name: str
    value: float
    limit: str
    ok: bool | None
    spread: tuple[float, float]
    unit: str
    wall: float | None = None
    note: str = ""


@define(kw_only=True)
class Times:
    """CPU time and wall time of a variant in each round, in seconds; on a GPU, both are the wall time."""

    cpu: list[float] = field(factory=list)
    wall: list[float] = field(factory=list)


def device() -> torch.device:
    """Return the device on which the benchmarks run."""
    return torch.device("cuda" if GPU in os.environ else "cpu")


def autocast() -> torch.autocast:
    """Return the autocast context of forward passes, which uses bfloat16 on a GPU only."""
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=GPU in os.environ)


def wait() -> None:
    """Wait until the device has finished."""
    if GPU in os.environ:
        torch.cuda.synchronize()


def in_turns(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1
) -> dict[str, Times]:
    """Run each variant once per round, in an order that rotates from round to round; return their times.

    The `warmup` rounds come first; their times are not returned.
    """
    names = list(variants)
    times = {name: Times() for name in names}
    for turn in range(-warmup, rounds):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            wait()
            wall, cpu = time.perf_counter(), time.process_time()
            variants[name]()
            wait()
            if turn >= 0:
                elapsed, used = time.perf_counter() - wall, time.process_time() - cpu
                times[name].cpu.append(elapsed if GPU in os.environ else used)
                times[name].wall.append(elapsed)
    return times


def ratio_row(
    name: str, over: Times, under: Times, *, limit: str = "", scale: float = 1.0, note: str = ""
) -> Row:
    """Return the row of the ratio of two variants' times, `over` / `under`, multiplied by `scale`."""
    ratios = [scale * a / b for a, b in zip(over.cpu, under.cpu, strict=True)]
    walls = [scale * a / b for a, b in zip(over.wall, under.wall, strict=True)]
    return row(name, ratios, limit=limit, unit="x", wall=statistics.median(walls), note=note)


def row(
    name: str,
    values: Sequence[float],
    *,
    limit: str = "",
    unit: str,
    wall: float | None = None,
    note: str = "",
) -> Row:
    """Return the row with the median and the quartiles of repeated measurements."""
    value = statistics.median(values)
    first = third = value
    if len(values) > 1:
        first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    ok = within(value, limit) if limit else None
    return Row(
        name=name, value=value, limit=limit, ok=ok, spread=(first, third), unit=unit, wall=wall, note=note
    )


def within(value: float, limit: str) -> bool:
    """Return whether a value is within a limit such as `<= 1.3` or `>= 300`."""
    sign, number = limit.split()
    return value <= float(number) if sign == "<=" else value >= float(number)


def peak_mib(prepare: Callable[..., Callable[[], object]], *arguments: object) -> float:
    """Return the peak memory that a function needs, measured in a new process.

    On a GPU, the memory that torch allocates on the device is measured in this process.

    Args:
        prepare: A module-level function, because the new process imports it by name. It makes the inputs,
            the memory of which is not counted, and returns the function to measure.
        arguments: Arguments of `prepare`, which must be picklable.

    Returns:
        MiB of memory in addition to the inputs; with `--quick`, always 1.
    """
    if QUICK in os.environ:  # starting a process takes seconds
        prepare(*arguments)()
        return 1.0
    if GPU in os.environ:
        return _grown_on_device(prepare, arguments)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_grown, prepare, arguments).result()


def return_freed_memory() -> None:
    """Make glibc return freed tensors of 64 KiB or more to the kernel from now on.

    A function `prepare` for `peak_mib` may call this function. By default, glibc keeps most freed memory, so
    gaps between blocks that stay in use, such as gradients, count as resident memory.

    Raises:
        OSError: glibc refuses the setting.
    """
    if not ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _SMALL_BLOCK):
        raise OSError("glibc refuses M_MMAP_THRESHOLD")


def _grown(prepare: Callable[..., Callable[[], object]], arguments: Sequence[object]) -> float:
    """Return the peak growth in this process, in MiB.

    Writing to `clear_refs` resets the kernel's record of the peak to the current resident memory.
    """
    torch.set_num_threads(1)
    measured = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kib("VmRSS")
    measured()
    return (status_kib("VmHWM") - before) / 1024


def _grown_on_device(prepare: Callable[..., Callable[[], object]], arguments: Sequence[object]) -> float:
    measured = prepare(*arguments)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    measured()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def status_kib(name: str) -> int:
    """Return a value of /proc/self/status in KiB.

    `ru_maxrss` is not used, because it starts with the peak of the parent process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def machine() -> dict[str, Any]:
    """Return a description of the machine and its load."""
    load = os.getloadavg()[0]
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpus[0].partition(": ")[2] if cpus else platform.machine(),
        **({"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if GPU in os.environ else {}),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_before": round(load, 2),
        "idle": load < IDLE_LOAD,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    lines = ["| what | median | quartiles | wall time | limit | |", "|---|---|---|---|---|---|"]
    for each in rows:
        first, third = each["spread"]
        wall = "" if each["wall"] is None else f"{each['wall']:.4g}"
        verdict = {True: "ok", False: "**missed**", None: ""}[each["ok"]]
        note = f" ({each['note']})" if each["note"] else ""
        lines.append(
            f"| {each['name']}{note} | {each['value']:.4g} {each['unit']} | {first:.4g} to {third:.4g} "
            f"| {wall} | {each['limit']} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def run_group(measure: Callable[[argparse.Namespace], list[Row]], description: str | None) -> int:
    """Run one benchmark: parse its arguments, measure, and print the rows.

    `--quick` uses tiny sizes and checks no limits. `--json FILE` writes the rows to a file.

    Returns:
        The exit code, which is 1 if a row misses its limit.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only shows that the code runs")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write machine and rows to FILE")
    args = parser.parse_args()
    if args.quick:
        os.environ[QUICK] = "1"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    host = machine()
    began = time.perf_counter()
    measured = measure(args)
    judged = not args.quick and GPU not in os.environ
    rows = [asdict(each if judged else evolve(each, ok=None)) for each in measured]
    found = {"machine": host, "seconds": round(time.perf_counter() - began, 1), "rows": rows}
    print(f"load {host['load_before']} on {host['cores']} cores, {found['seconds']} s")
    print(table(rows), end="")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(each["ok"] is False for each in rows))


def main(measure: Callable[[argparse.Namespace], list[Row]], description: str | None) -> None:
    """Run one benchmark as a program."""
    sys.exit(run_group(measure, description))
