"""Time and memory of a training step with each kind of heads, on the shape of SmolLM2-135M.

    python benchmarks/heads.py

The reference is the next-token step of transformers. B = 1, T = 256, 40 % of the tokens supervised, AdamW,
random weights. All variants that train all parameters share the base model and one optimiser. The benchmark
needs the plugin `baseline_mtp` and 6 GB of memory.

Shape letters: B rows, T positions, K heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from harness import MIB, Row, in_turns, main, peak_mib, ratio_row, return_freed_memory, row
from step import SMOLLM2, TINY, Bench, numbered
from weighted_mtp_core.model.policy import HEADS
from weighted_mtp_core.recipe.schema import HeadKind, LossTable
from weighted_mtp_core.training.policy_learner import PolicyLearner

from weighted_mtp_baseline_mtp import UniformOptions, build_uniform

K = 4
LIMITS: Mapping[HeadKind, str] = {"medusa": "<= 1.05", "parallel": "<= 1.15", "sequential": "<= 1.35"}
QUICK = {**TINY, "vocab_size": 8192}
FEW_LAYERS = {**SMOLLM2, "num_hidden_layers": 4, "vocab_size": 4096}
"""A model shape in which the activations of a head are a large share of a step's memory.

`sequential` heads are measured on the whole model instead, because for K > 1 their backward pass computes the
activations of one module again, and K = 1 does not need this memory.
"""


def prepare_step(
    heads: tuple[HeadKind, int] | None, train: str, shape: Mapping[str, int], positions: int
) -> Callable[[], object]:
    """Return a function that runs the first step of a new model; if `heads` is None, transformers' step."""

    def step(bench: Bench) -> Callable[[], object]:
        if heads is None:
            return numbered(bench.transformers_step())
        return numbered(bench.our_step(_learner(bench, "own")))

    return _warm(step, heads or ("medusa", 1), train, shape, positions)


def prepare_gradients(
    heads: tuple[HeadKind, int], shape: Mapping[str, int], positions: int
) -> Callable[[], object]:
    """Return a function that computes the gradients of a step, for `peak_mib`.

    The optimiser is left out, because AdamW's moments would hide the growth of other memory. Freed memory is
    not counted, because with more heads, there would be more gaps of freed memory between gradients.
    """
    return_freed_memory()

    def step(bench: Bench) -> Callable[[], object]:
        learner = _learner(bench, "own")
        return lambda: learner.learn(bench.batches(0), step=0)

    return _warm(step, heads, "all", shape, positions)


def _warm(
    step: Callable[[Bench], Callable[[], object]],
    heads: tuple[HeadKind, int],
    train: str,
    shape: Mapping[str, int],
    positions: int,
) -> Callable[[], object]:
    """Return the step of a model, after a step of a tiny model, which loads what is loaded lazily."""
    stack = ExitStack()
    tiny, own = (
        stack.enter_context(Bench.of(*each, {"own": heads}, base_is_frozen=train == "heads"))
        for each in ((TINY, 16), (shape, positions))
    )
    step(tiny)()
    return step(own)


def _learner(bench: Bench, name: str, loss: LossTable | None = None) -> PolicyLearner:
    weighting = build_uniform(UniformOptions(), bench.context())
    return bench.learner(bench.policies[name], weighting, loss=loss)


def times(shape: Mapping[str, int], positions: int, rounds: int) -> list[Row]:
    """Return the rows with the times of steps."""
    everything: dict[str, tuple[HeadKind, int]] = {kind: (kind, K) for kind in HEADS}
    with (
        Bench.of(shape, positions, everything) as bench,
        Bench.of(shape, positions, everything, base_is_frozen=True) as later,
    ):
        variants: dict[str, Callable[[], object]] = {"transformers": numbered(bench.transformers_step())}
        for kind in HEADS:
            variants[kind] = numbered(bench.our_step(_learner(bench, kind)))
            variants[f"{kind}, kl"] = numbered(bench.our_step(_learner(bench, kind, LossTable(heads="kl"))))
            variants[f"{kind}, heads"] = numbered(later.our_step(_learner(later, kind)))
        found = in_turns(variants, rounds=rounds)
    rows = []
    for kind in HEADS:
        name = f"heads: step of {kind}, K = {K}"
        rows += [
            ratio_row(
                f"{name}, over transformers' next-token step",
                found[kind],
                found["transformers"],
                limit=LIMITS[kind],
            ),
            ratio_row(
                f'{name}, loss.heads = "kl" over "labels"',
                found[f"{kind}, kl"],
                found[kind],
                limit="<= 1.35",
            ),
            ratio_row(
                f"{name}, training heads 2..{K} alone over all",
                found[f"{kind}, heads"],
                found[kind],
                limit="<= 0.6",
            ),
        ]
    return rows


def peaks(shape: Mapping[str, int], positions: int) -> list[Row]:
    """Return the rows with the peak memory of a step: activations, gradients and AdamW's moments."""
    reference = peak_mib(prepare_step, None, "all", shape, positions)
    rows = [row("heads: peak of transformers' next-token step", [reference], unit="MiB")]
    for kind in HEADS:
        own, alone = (
            peak_mib(prepare_step, (kind, K), train, shape, positions) for train in ("all", "heads")
        )
        name = f"heads: peak of {kind}, K = {K}"
        rows += [
            row(
                f"{name}, over transformers' next-token step", [own / reference], limit=LIMITS[kind], unit="x"
            ),
            row(f"{name}, training heads 2..{K} alone over all", [alone / own], limit="<= 0.5", unit="x"),
        ]
    return rows


def flatness(kind: HeadKind, shape: Mapping[str, int], positions: int, sizes: tuple[int, ...]) -> Row:
    """Return the row with the largest peak over all K, divided by the smallest peak.

    Memory that must grow with K is not counted: the gradients of heads 2..K and, for heads that read each
    other, the states of each head and their gradients.
    """
    found = []
    for n_future in sizes:
        with Bench.of(shape, 16, {"own": (kind, n_future)}) as bench:
            heads = bench.policies["own"].heads
            floats = sum(each.numel() for each in heads[1:].parameters())
            if heads.chained:
                floats += 2 * n_future * positions * bench.policies["own"].hidden_size
        found.append(peak_mib(prepare_gradients, (kind, n_future), shape, positions) - 4 * floats / MIB)
    note = ", ".join(f"{peak:.0f}" for peak in found)
    return row(
        f"heads: largest over smallest peak of {kind}, over K",
        [max(found) / min(found)],
        limit="<= 1.1",
        unit="x",
        note=f"MiB at K = {', '.join(map(str, sizes))}: {note}",
    )


def measure(args: argparse.Namespace) -> list[Row]:
    """Run this benchmark; return the rows of its table."""
    shape, positions, rounds = (QUICK, 128, 2) if args.quick else (SMOLLM2, 256, 4)
    few, longer, sizes = (QUICK, 128, (1, 2)) if args.quick else (FEW_LAYERS, 1024, (1, 2, 4, 8))
    return [
        *times(shape, positions, rounds),
        *peaks(shape, positions),
        *(flatness(kind, shape if kind == "sequential" else few, longer, sizes) for kind in HEADS),
    ]


if __name__ == "__main__":
    main(measure, __doc__)
