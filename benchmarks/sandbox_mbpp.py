"""Compare the sandbox's verdicts with recorded ones, program by program.

    python benchmarks/sandbox_mbpp.py FOLDER [--limit N] [--repeat]

FOLDER contains `mbpp.jsonl` (MBPP's public release) and `mbpp_solutions.jsonl`. A line of the latter contains
task_id, program and verdict (pass, fail or timeout), recorded by running the program and the asserts in one
process. Two verdicts agree if both, or neither of them, state that the program passed. `--repeat` judges all
programs again and counts the verdicts that change.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from weighted_mtp_core.api import Verdict

from weighted_mtp_code_tasks.sandbox import AssertsJob, Sandbox
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tests_of(problem: dict[str, Any]) -> str:
    """Return the set-up code and the asserts of a problem."""
    return "\n".join([problem["test_setup_code"], *problem["test_list"]])


def report(name: str, rows: list[dict[str, Any]], verdicts: list[Verdict]) -> None:
    """Print how many verdicts agree, and each program for which they differ."""
    table = Counter((row["verdict"], verdict.kind.value) for row, verdict in zip(rows, verdicts, strict=True))
    agree = sum(
        count for (recorded, kind), count in table.items() if (recorded == "pass") == (kind == "passed")
    )
    print(f"{name}: {agree} of {len(rows)} agree ({100 * agree / len(rows):.2f} %)")
    for (recorded, kind), count in sorted(table.items()):
        print(f"    recorded {recorded:<8} here {kind:<12} {count}")
    for row, verdict in zip(rows, verdicts, strict=True):
        if (row["verdict"] == "pass") != verdict.passed:
            print(f"    task {row['task_id']} ({row['verdict']}): {verdict.kind.value} {verdict.detail}")


def main() -> None:
    """Judge the canonical solutions and the recorded programs; print how many verdicts agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--repeat", action="store_true")
    args = parser.parse_args()
    problems = {row["task_id"]: row for row in read(args.folder / "mbpp.jsonl")}
    canonical = [
        {"task_id": name, "verdict": "pass", "program": row["code"]} for name, row in problems.items()
    ]
    recorded = read(args.folder / "mbpp_solutions.jsonl")[: args.limit]
    jobs = [AssertsJob(row["program"], tests_of(problems[row["task_id"]])) for row in canonical + recorded]

    settings = SandboxSettings(backend=args.backend, cpu_seconds=5, wall_seconds=60)
    with Sandbox(settings) as sandbox:
        print(", ".join(f"{key} {value}" for key, value in sandbox.provenance.items()))
        start = time.perf_counter()
        verdicts = sandbox.judge(jobs)
        print(f"{len(jobs)} programs, {len(jobs) / (time.perf_counter() - start):.0f} a second")
        again = sandbox.judge(jobs) if args.repeat else verdicts
    report("canonical solutions", canonical, verdicts[: len(canonical)])
    report("recorded programs", recorded, verdicts[len(canonical) :])
    if args.repeat:
        changed = [pair for pair in zip(verdicts, again, strict=True) if pair[0].kind is not pair[1].kind]
        print(f"judged again: {len(changed)} verdicts changed")
        for one, other in changed:
            print(f"    {one.kind.value} {one.detail} -> {other.kind.value} {other.detail}")


if __name__ == "__main__":
    main()
