"""Run all benchmarks, one after the other, each group in a separate process.

    make bench
    python benchmarks/bench.py loss step      only these groups; the results of other groups are kept
    python benchmarks/bench.py --gpu          the groups for a GPU, on the CUDA device: gpu.json and gpu.md

Without `--gpu`, the results are written to results.json, results.md and results.png next to this file. The
exit code is 1 if a row misses its limit or a group fails, and 2 if `--gpu` finds no CUDA device. No other
program should run on the machine at the same time; the JSON file records the load average before each group.
`tracking.py`, `sandbox_mbpp.py` and `sandbox_speed.py` are not groups; each is started separately.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import GPU, table

HERE = Path(__file__).parent
GROUPS = (
    "loss",
    "advantages",
    "step",
    "optimisers",
    "heads",
    "adapters",
    "memory",
    "padding",
    "corpus",
    "checkpointing",
    "busy",
    "decoding",
    "trainers",
    "reduction",
    "sharding",
)
ON_GPU = ("mfu", "optimisers", "loss", "liger", "trainers")
RESULTS = HERE / "results.json"
Group = dict[str, Any]


def measure(name: str) -> Group | None:
    """Run a group on one thread and return its results; None if the group failed."""
    print(f"--- {name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(file)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        if not file.is_file():
            return None
        found: Group = json.loads(file.read_text())
        return found


def save(groups: Mapping[str, Group], file: Path) -> None:
    """Write the results as JSON, as a Markdown table and, if any limit was checked, as a plot."""
    rows = [{"group": name, **row} for name, group in groups.items() for row in group["rows"]]
    machines = {name: {**group["machine"], "seconds": group["seconds"]} for name, group in groups.items()}
    file.write_text(json.dumps({"machines": machines, "rows": rows}, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(rows))
    if any(row["ok"] is not None for row in rows):
        plot(rows, file.with_suffix(".png"))


def saved(file: Path) -> dict[str, Group]:
    """Return the results of earlier runs of the benchmarks; empty if the file does not exist."""
    if not file.is_file():
        return {}
    found = json.loads(file.read_text())
    return {
        name: {
            "machine": machine,
            "seconds": machine.pop("seconds"),
            "rows": [
                {key: value for key, value in row.items() if key != "group"}
                for row in found["rows"]
                if row["group"] == name
            ],
        }
        for name, machine in found["machines"].items()
    }


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Plot each row that has a limit as a share of its limit; for all rows, a share below 1 is good."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    limited = [row for row in reversed(rows) if row["limit"]]
    if not limited:
        return

    def share(row: Mapping[str, Any], value: float) -> float:
        sign, number = row["limit"].split()
        ratio = max(value, 1e-12) / float(number)
        return ratio if sign == "<=" else 1 / ratio

    figure, axes = plt.subplots(figsize=(10, 0.32 * len(limited) + 1.2), layout="constrained")
    for y, row in enumerate(limited):
        value = share(row, row["value"])
        ends = sorted(share(row, end) for end in row["spread"])
        axes.barh(y, value, color="tab:blue" if row["ok"] else "tab:red", height=0.6)
        axes.plot(ends, [y, y], color="black", linewidth=1)
    axes.set_yticks(range(len(limited)), [f"{row['name']} ({row['limit']})" for row in limited], fontsize=7)
    axes.axvline(1, color="black", linestyle=":")
    axes.set_xscale("log")
    widest = max(share(row, max(row["spread"])) for row in limited)
    axes.set_xlim(0.02, max(2.0, 1.2 * widest))
    axes.set_xlabel("share of the limit; left of the line is within the limit")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> int:
    """Run the groups, write the results, and list the groups that failed and the rows that miss a limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--gpu", action="store_true", help=f"measure {', '.join(ON_GPU)} on the CUDA device")
    parser.add_argument("--check", action="store_true", help="with --gpu: only look for the CUDA device")
    args = parser.parse_args()
    every, file = (ON_GPU, HERE / "gpu.json") if args.gpu else (GROUPS, RESULTS)
    if args.gpu and not torch.cuda.is_available():
        print("error: there is no CUDA device here", file=sys.stderr)
        return 2
    if args.check:
        return 0
    if args.gpu:
        os.environ[GPU] = "1"
    if unknown := set(args.groups) - set(every):
        parser.error(f"no group {', '.join(sorted(unknown))}")
    groups, failed = saved(file), []
    for name in args.groups or every:
        found = measure(name)
        if found is None:
            failed.append(name)
            continue
        groups[name] = found
        save({each: groups[each] for each in every if each in groups}, file)
    missed = [row["name"] for group in groups.values() for row in group["rows"] if row["ok"] is False]
    for name in failed:
        print(f"FAILED {name}: see above")
    for name in missed:
        print(f"MISSED {name}")
    return int(bool(failed or missed))


if __name__ == "__main__":
    sys.exit(main())
