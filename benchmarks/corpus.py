"""A large corpus against a small one: time to the first batch, and memory while batches are read.

    python benchmarks/corpus.py

The corpora are tokenised before the measurement, because runs of a recipe tokenise their data only once. The
time to the first batch includes the start of a new interpreter. Processes with the small and the large corpus
take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import MIB, Row, Times, main, peak_mib, ratio_row, row
from weighted_mtp_core.data.array_files import array_appender
from weighted_mtp_core.data.batches import StepBatches
from weighted_mtp_core.data.tokens import open_tokens
from weighted_mtp_core.recipe.schema import DataTable
from weighted_mtp_core.storage.manifest import atomic_folder
from weighted_mtp_core.storage.verify_once import verify_once

BATCH, LONGEST, SMALL_MIB, WHOLE_MIB = 8, 1024, 2, 2048
READ = 4000  # batches: about 35 MiB of token ids, plus the rest of the 4 KiB pages that contain them


def write_corpus(folder: Path, *, mib: int) -> None:
    """Write a tokenised corpus with `mib` MiB of ids; the ids repeat, which does not affect any time."""
    generator = np.random.default_rng(0)
    ids_N = generator.integers(2, 49152, size=MIB // 2, dtype=np.uint16)
    length_D = generator.integers(LONGEST // 8, LONGEST, size=2 * mib * ids_N.size // LONGEST)
    start_D1 = np.concatenate([[0], np.cumsum(length_D)])
    start_D1 = start_D1[start_D1 <= mib * ids_N.size]
    documents = len(start_D1) - 1
    names = [b"%08d" % d for d in range(documents)]
    columns = {
        "start": start_D1,
        "prompt": np.full(documents, LONGEST // 16, dtype=np.int32),
        "reward": np.ones(documents, dtype=np.float32),
        "problem": np.arange(documents),
        "problem_hash": np.arange(documents),
        "name": np.frombuffer(b"".join(names), dtype=np.uint8),
        "name_start": 8 * np.arange(documents + 1),
        "metadata": np.empty(0, dtype=np.uint8),
        "metadata_start": np.zeros(documents + 1, dtype=np.int64),
    }
    with atomic_folder(folder) as temporary:
        for name, values in columns.items():
            np.save(temporary / f"{name}.npy", values)
        target_N = np.ones(ids_N.size, dtype=np.bool_)
        for name, values in (("ids", ids_N), ("target", target_N)):
            with array_appender(temporary / f"{name}.npy", values.dtype) as append:
                for _ in range(mib):
                    append(values)
        (temporary / "meta.json").write_text(json.dumps({"examples": documents, "left_out": 0}))


def batches_of(folder: str) -> StepBatches:
    """Open a corpus in the same way as a run."""
    return StepBatches(
        open_tokens(Path(folder), sha256=verify_once(Path(folder))),
        DataTable(use="core.jsonl"),
        batch_size=BATCH,
        seed=0,
        device=torch.device("cpu"),
    )


def time_start(folder: Path, times: Times) -> None:
    """Start a process that makes the first batch, and append its wall time and CPU time to `times`."""
    code = f"import corpus, time; corpus.batches_of({str(folder)!r})(0); print(time.process_time())"
    wall = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
    )
    times.wall.append(time.perf_counter() - wall)
    times.cpu.append(float(done.stdout))


def reading(folder: str, count: int) -> Callable[[], object]:
    """Read some batches, then return a function that reads the next `count` batches."""
    batches = batches_of(folder)

    def read(first: int, last: int) -> None:
        for step in range(first, last):
            batches(step)

    read(0, 200)
    return partial(read, 200, 200 + count)


def measure(args: argparse.Namespace) -> list[Row]:
    """Run this benchmark; return the rows of its table."""
    small, whole, count, rounds = (1, 4, 20, 2) if args.quick else (SMALL_MIB, WHOLE_MIB, READ, 9)
    sizes = {"small": small, "large": 4 if args.quick else 100 * small, "whole": whole}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in sizes}
        for name, mib in sizes.items():
            write_corpus(folders[name], mib=mib)
            verify_once(folders[name])
        times = {name: Times() for name in ("small", "large")}
        for turn in range(rounds):
            for name in sorted(times, reverse=bool(turn % 2)):
                time_start(folders[name], times[name])
        seconds = statistics.median(times["small"].cpu)
        growth = {mib: peak_mib(reading, str(folders[name]), count) for name, mib in sizes.items()}
    return [
        ratio_row(
            "corpus: start-up with 100 times the data",
            times["large"],
            times["small"],
            limit="<= 1.05",
            note=f"{sizes['large']} MiB of ids over {small}, until the first batch; {seconds:.1f} s of CPU",
        ),
        *(
            row(
                f"corpus: memory gained over {count} batches, {mib} MiB of ids",
                [peak],
                limit="<= 16" if mib == whole else "",
                unit="MiB",
                note="resident, including mapped pages",
            )
            for mib, peak in growth.items()
        ),
    ]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(measure, __doc__)
