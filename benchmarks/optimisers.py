"""Time and memory of an optimiser's step, for each optimiser of `[train.optimiser]`.

    python benchmarks/optimisers.py

The parameters are four decoder layers with the shape of SmolLM2-135M, without embeddings. Parameters and
gradients are random and do not count in the peak memory, which contains the state and the temporary tensors
of the optimiser.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from harness import MIB, Row, device, in_turns, main, peak_mib, ratio_row, row
from torch import nn
from weighted_mtp_core.recipe.train_table import OptimiserName, OptimiserTable, TrainTable
from weighted_mtp_core.training.optimisers import make_optimisers

HIDDEN, INNER, KEYS = 576, 1536, 192
LAYER = (
    *((HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN)),  # attention
    *((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)),  # feed-forward network
    *((HIDDEN,), (HIDDEN,)),  # norms
)


def prepared(name: OptimiserName, layers: int) -> tuple[list[nn.Parameter], list[torch.optim.Optimizer]]:
    """Return parameters with gradients, and their optimisers."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, device=device())) for shape in LAYER * layers]
    for each in parameters:
        each.grad = torch.randn_like(each)
    return parameters, make_optimisers(parameters, TrainTable(optimiser=OptimiserTable(name=name)))


def step(optimisers: list[torch.optim.Optimizer]) -> None:
    """Run a step of each optimiser; the value 0 of `found_inf` means that the step is not skipped."""
    for each in optimisers:
        each.found_inf = torch.zeros((), device=device())  # type: ignore[attr-defined]
        each.step()


def two_steps(name: OptimiserName, layers: int) -> Callable[[], object]:
    """Return a function that runs the first two steps of an optimiser."""
    parameters, optimisers = prepared(name, layers)

    def run() -> object:
        step(optimisers)
        step(optimisers)
        return parameters

    return run


def measure(args: argparse.Namespace) -> list[Row]:
    """Measure each optimiser, and its time relative to `adamw`."""
    layers = 1 if args.quick else 4
    made = {name: prepared(name, layers) for name in get_args(OptimiserName)}
    times = in_turns(
        {name: partial(step, optimisers) for name, (_, optimisers) in made.items()},
        rounds=1 if args.quick else 3,
    )
    rows = []
    for name, (parameters, optimisers) in made.items():
        count = sum(each.numel() for each in parameters)
        states = [state for each in optimisers for state in each.state.values()]
        held = sum(x.numel() * x.element_size() for state in states for x in state.values())
        limit = {"adamw": "<= 8.1", "adamw_8bit": "<= 2.1", "muon": "<= 4.1"}[name]
        rows.append(row(f"{name}: state", [held / count], limit=limit, unit="bytes per parameter"))
        rows.append(
            row(
                f"{name}: step of a million parameters",
                [1e9 * each / count for each in times[name].cpu],  # milliseconds per million parameters
                unit="ms",
            )
        )
        if name != "adamw":
            rows.append(ratio_row(f"{name}: step relative to adamw", times[name], times["adamw"]))
        peak = peak_mib(two_steps, name, layers)
        rows.append(row(f"{name}: peak memory, relative to parameters", [peak * MIB / 4 / count], unit="x"))
    return rows


if __name__ == "__main__":
    main(measure, __doc__)
