"""Memory and rate of training steps with K = 1 and K = 4, and the rate relative to a large matrix product.

    python benchmarks/bench.py --gpu mfu

On a GPU, the models have the shapes of SmolLM2-135M and of a Llama with 1.1 billion parameters; the second
model needs 40 GB of device memory. A batch has 8 rows of 1024 tokens, 40 % supervised; the steps use bfloat16
and AdamW. The relative rate is the model FLOPs utilisation (MFU), here relative to a measured rate and not to
the rate in a data sheet. `weighted_mtp_core/model/flops.py` counts the operations.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping

import torch
from harness import GPU, MIB, Row, device, in_turns, main, ratio_row, row
from step import SMOLLM2, TINY, Bench, numbered
from weighted_mtp_core.recipe.schema import HeadKind
from weighted_mtp_core.runtime.cost import forget_peak, matrix_rate, peak_memory
from weighted_mtp_core.runtime.device import Compute

from weighted_mtp_baseline_mtp import UniformOptions, build_uniform

BILLION = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
NEEDED = 40e9  # bytes of device memory; parameters, gradients and moments take 20 GB of them


def shapes(*, quick: bool) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Yield the name and the shape of each model that fits on the device."""
    if quick:
        yield "a tiny model", TINY
        return
    yield "SmolLM2-135M's shape", SMOLLM2
    if torch.cuda.get_device_properties(0).total_memory >= NEEDED:
        yield "a shape of 1.1 billion", BILLION
    else:
        print(f"the shape of 1.1 billion parameters is left out: it needs {NEEDED / 1e9:.0f} GB")


def rows_of(name: str, bench: Bench, *, rounds: int, rate: float) -> list[Row]:
    """Return the rows for one model."""
    weighting = build_uniform(UniformOptions(), bench.context())
    learners = {head: bench.learner(policy, weighting) for head, policy in bench.policies.items()}
    steps: dict[str, Callable[[], object]] = {"transformers' step": numbered(bench.transformers_step())}
    steps |= {head: numbered(bench.our_step(learner)) for head, learner in learners.items()}
    times = in_turns(steps, rounds=rounds, warmup=3)
    batch, rows = bench.batches(0), []
    for head, learner in learners.items():
        flops, label, wall = learner.flops(batch), f"mfu: {name}, {head}", times[head].wall
        rows += [
            row(
                f"{label}: share of the product rate",
                [flops / seconds / rate for seconds in wall],
                unit="x",
                note=f"{flops / 1e9:.4g} GFLOP a step",
            ),
            row(
                f"{label}: tokens per second",
                [batch.ids_BT.numel() / seconds for seconds in wall],
                unit="tokens/s",
            ),
            ratio_row(f"{label}: over transformers' step", times[head], times["transformers' step"]),
        ]
    peaks = {each: _peak(step) for each, step in steps.items()}
    return rows + [
        row(f"mfu: {name}, {each}: peak memory", [peak], unit="MiB") for each, peak in peaks.items()
    ]


def _peak(step: Callable[[], object]) -> float:
    """Return the peak memory during a step, in MiB, including parameters and moments.

    On a GPU, this is the memory on the device; on a CPU, it is the memory of the process.
    """
    forget_peak(device())
    step()
    peaks = peak_memory(device())
    return peaks.get("device", peaks["host"]) / MIB


def measure(args: argparse.Namespace) -> list[Row]:
    """Run this benchmark; return the rows of its table."""
    on_gpu = GPU in os.environ
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rate = matrix_rate(Compute(device=device(), dtype=dtype))
    rows = [row("mfu: rate of a large matrix product", [rate / 1e12], unit="TFLOP/s")]
    batch_size, positions, rounds = (2, 32, 2) if args.quick else (8, 1024, 10)
    for name, shape in shapes(quick=args.quick):
        heads: dict[str, tuple[HeadKind, int]] = {"K = 1": ("parallel", 1), "K = 4": ("parallel", 4)}
        with Bench.of(shape, positions, heads, batch_size=batch_size) as bench:
            rows += rows_of(name, bench, rounds=rounds, rate=rate)
        del bench
        if on_gpu:
            torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    main(measure, __doc__)
