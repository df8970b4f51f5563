"""The forecast of memory against measured peaks: micro, the shape of SmolLM2-135M, and 400 M parameters.

    python benchmarks/memory.py

The measured process trains for two steps with AdamW in float32, on one document of which 40 % is supervised.
Parameters, gradients, moments and activations all count. The forecast runs the same step on tensors without
values. The benchmark needs the plugin `baseline_mtp` and 10 GB of memory.

Shape letters: T positions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from attrs import evolve
from harness import MIB, Row, main, peak_mib, return_freed_memory, row
from step import SMOLLM2, SUPERVISED, TINY, Bench, numbered
from transformers import LlamaConfig
from weighted_mtp_core.memory.documents import Documents
from weighted_mtp_core.memory.parts import TRAINING, Target
from weighted_mtp_core.memory.phases import find_phases
from weighted_mtp_core.model.adapters import adapt
from weighted_mtp_core.plan import make_plan
from weighted_mtp_core.recipe.schema import ModelTable
from weighted_mtp_core.recipe.train_table import TrainTable
from weighted_mtp_core.training.optimisers import make_optimisers

from weighted_mtp_baseline_mtp import UniformOptions, build_uniform

K = 4
WITHOUT, WITH = "without", "with"
MICRO = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
MEDIUM = {
    "vocab_size": 49152,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
SHAPES: Mapping[str, tuple[Mapping[str, int], int]] = {
    "micro": (MICRO, 2048),
    "135 M": (SMOLLM2, 512),
    "400 M": (MEDIUM, 256),
}
"""Shapes of the base model, each with the length T of the training document."""

_RECIPE = """
tracker = []
[run]
name = "memory"
[model]
base = {base}
n_future = {n_future}
train = {train}
activation_checkpointing = {checkpointing}
[data]
use = "core.jsonl"
options = {{ path = "nowhere.jsonl" }}
max_tokens = {positions}
[weighting]
use = "baseline_mtp"
[train]
batch_size = 1
"""


def forecast_mib(shape: Mapping[str, int], positions: int, train: str, how: str) -> float:
    """Return the forecast of the peak memory of training, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        _config(shape).save_pretrained(folder)
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text(
            _RECIPE.format(
                base=json.dumps(folder),
                n_future=K,
                train=json.dumps(train),
                checkpointing=json.dumps(how == WITH),
                positions=positions,
            )
        )
        one = np.ones(1, np.int64)
        documents = Documents(
            length_D=positions * one, prompt_D=round(positions * (1 - SUPERVISED)) * one, measured=True
        )
        phases = find_phases(make_plan(recipe), documents, Target(device="cpu", dtype=torch.float32))
    return next(phase for phase in phases.found if phase.name == TRAINING).total / MIB


def prepare_training(shape: Mapping[str, int], positions: int, train: str, how: str) -> Callable[[], object]:
    """Return a function that makes a model and trains it for two steps, for `peak_mib`.

    A tiny model is trained first, which loads what is loaded lazily.
    """
    return_freed_memory()

    def train_two_steps(own: Mapping[str, int], tokens: int) -> None:
        with Bench.of(own, tokens, {"own": ("parallel", K)}, base_is_frozen=train == "heads") as made:
            bench, policy = made, made.policies["own"]
            if train == "adapters":
                adapt(policy, ModelTable(train="adapters"))
                (optimiser,) = make_optimisers(policy.parameters(), TrainTable())
                bench = evolve(made, optimiser=optimiser)
            if how == WITH:
                policy.recompute_activations()
            step = numbered(
                bench.our_step(bench.learner(policy, build_uniform(UniformOptions(), bench.context())))
            )
            step()
            step()

    train_two_steps(TINY, 16)
    return lambda: train_two_steps(shape, positions)


def _config(shape: Mapping[str, int]) -> LlamaConfig:
    return LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=2048)


def measure(args: argparse.Namespace) -> list[Row]:
    """Run this benchmark; return the rows of its table."""
    rows = []
    for name, (shape, positions) in ({"tiny": (TINY, 64)} if args.quick else SHAPES).items():
        for train, how in itertools.product(("all", "heads", "adapters"), (WITHOUT, WITH)):
            planned = forecast_mib(shape, positions, train, how)
            found = peak_mib(prepare_training, shape, positions, train, how)
            rows += [
                row(
                    f'memory: {name}, train = "{train}", {how} checkpointing: {side}',
                    [value],
                    limit=limit,
                    unit="x",
                    note=f"{planned:.0f} and {found:.0f} MiB",
                )
                for side, value, limit in (
                    ("forecast over measured", planned / found, "<= 1.15"),
                    ("measured over forecast", found / planned, "<= 1.15"),
                )
            ]
    return rows


if __name__ == "__main__":
    main(measure, __doc__)
