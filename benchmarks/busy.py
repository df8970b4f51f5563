"""Time of a step of stage 2 beside a process that keeps one core busy, over the time on an idle machine.

    python benchmarks/busy.py

The micro model of the default recipes trains with one thread per core, on 8 rows of about 200 tokens per
step. The model trains in a separate process that imports `weighted_mtp_core` before torch, like a run. This
import sets `GOMP_SPINCOUNT` (how long waiting threads spin), which torch reads when it is loaded. Five steps
on the idle machine and five steps with the busy process alternate. Times are wall times, because threads wait
for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from checkpointing import learner_of, micro_shape
from harness import Row, main, row
from humaneval_lengths import humaneval_tokens
from step import TINY
from weighted_mtp_core.data.batches import StepBatches
from weighted_mtp_core.recipe.schema import DataTable
from weighted_mtp_core.recipe.train_table import TrainTable
from weighted_mtp_core.training.optimisers import clip_gradients, make_optimisers

STEPS = 5


@contextmanager
def busy_process() -> Iterator[None]:
    """Keep one core busy during the `with` block."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def seconds_per_step(*, quick: bool) -> list[tuple[float, float]]:
    """Train; return for each round the seconds per step on the idle machine and with the busy process."""
    shape, rows, rounds = (TINY, 2, 2) if quick else (micro_shape(), 8, 9)
    table = DataTable(use="benchmark")
    tokens = humaneval_tokens(shape["vocab_size"])
    batches = StepBatches(tokens, table, batch_size=rows, seed=0, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        learner = learner_of(shape, Path(folder), steps=1000, pairs_per_step=batches.pairs_per_step(4))
    parameters = list(learner.parameters())
    (optimiser,) = make_optimisers(parameters, TrainTable())
    batch = batches(0)

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            learner.learn(batch, step=0)
            clip_gradients(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return (time.perf_counter() - began) / STEPS

    measure()
    found = []
    for _ in range(rounds):
        idle = measure()
        with busy_process():
            found.append((idle, measure()))
    return found


def measure(args: argparse.Namespace) -> list[Row]:
    """Run this benchmark; return the rows of its table."""
    threads = os.cpu_count() or 1
    program = "import json, weighted_mtp_core, busy; print(json.dumps(busy.seconds_per_step(quick={})))"
    done = subprocess.run(
        [sys.executable, "-c", program.format(args.quick)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: list[tuple[float, float]] = json.loads(done.stdout.splitlines()[-1])
    return [
        row(
            "busy machine: step of the micro model beside one busy process over idle, by the clock",
            [busy / idle for idle, busy in found],
            limit="<= 2.2",
            unit="x",
            note=f"{threads} threads",
        ),
        row("busy machine: step of the micro model, idle", [1000 * idle for idle, _ in found], unit="ms"),
    ]


if __name__ == "__main__":
    main(measure, __doc__)
