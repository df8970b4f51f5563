"""What checkpoints cost a training: the same loop with one every 10 steps, and with none but the last.

    python benchmarks/checkpointing.py

The micro model of the default recipes (8 rows of some 200 tokens a step) and a model of SmolLM2-135M's shape
(2 rows), AdamW; snapshots go to the temporary folder (choose its disk with TMPDIR) and need 6 GB there.
Training has one thread and writing another, so the CPU time of all threads is the price on a machine with no
core to spare, the clock that on one with two.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from attrs import frozen
from harness import Row, in_turns, main, row
from humaneval_lengths import humaneval_tokens
from step import SMOLLM2, TINY
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import BuildContext
from weighted_mtp_core.data.steps import make_step_batches
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.recipe.schema import CheckpointTable, DataTable, LossTable, MicroTable, TrainTable
from weighted_mtp_core.stages.checkpoint import load_model, save_model
from weighted_mtp_core.stages.checkpoints import Checkpoints
from weighted_mtp_core.stages.loop import Learner, Validation, train
from weighted_mtp_core.stages.policy import Arm, PolicyLearner

from weighted_mtp_baseline_mtp import UniformOptions, build_uniform

EVERY = 10


@frozen(kw_only=True)
class Model:
    """What is trained.

    Attributes:
        name: For the table.
        rows: Rows a step.
        snapshots: Taken in a round of the arm that takes them.
        rounds: How often both arms train.
        shape: Of the Llama.
    """

    name: str
    rows: int
    snapshots: int
    rounds: int
    shape: Mapping[str, int]


def micro_shape() -> dict[str, int]:
    """Return the shape of `base = "micro"`."""
    table = MicroTable()
    return {
        "vocab_size": table.vocab_size,
        "hidden_size": table.hidden_size,
        "intermediate_size": 4 * table.hidden_size,
        "num_hidden_layers": table.layers,
        "num_attention_heads": table.attention_heads,
        "num_key_value_heads": table.attention_heads,
    }


MODELS = (
    Model(name="micro", rows=8, snapshots=4, rounds=5, shape=micro_shape()),
    Model(name="SmolLM2's shape", rows=2, snapshots=2, rounds=1, shape=SMOLLM2),
)


class Quiet:
    """A reporter that tells nobody."""

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Forget them."""

    def timings(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Forget them."""

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Forget it."""


class Unvalidated(PolicyLearner):
    """Stage 2 without its validations, which are the same in both arms."""

    def validate(self, *, step: int) -> Validation:
        """Say that every state is as good as the first, so that the best one is written once."""
        del step
        return Validation(metrics={}, score=0.0)


def learner_of(shape: Mapping[str, int], folder: Path, *, steps: int) -> Learner:
    """Return stage 2 on a new model."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, tie_word_embeddings=True)
    policy = Policy(LlamaForCausalLM(config), n_future=4, head_kind="transformer")
    best = folder / "best_model.pt"
    weighting = build_uniform(UniformOptions(), BuildContext(seed=0, storage=folder))
    return Unvalidated(
        policy=policy,
        arm=Arm(weighting=weighting, needs=frozenset(), critic=None, label="benchmark"),
        loss=LossTable(),
        steps=steps,
        accumulation=1,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=list,
        best=best,
        save=partial(save_model, policy, best),
        restore=partial(load_model, policy, best),
    )


def training(model: Model, every: int, *, steps: int) -> Callable[[], None]:
    """Return a whole training that takes a snapshot every so many steps; 0 is only at the end."""
    table = DataTable(use="benchmark")
    tokens = humaneval_tokens(model.shape["vocab_size"])
    batches = make_step_batches(tokens, table, batch_size=model.rows, seed=0, device=torch.device("cpu"))

    def work() -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with Checkpoints(folder=folder, table=CheckpointTable(every=every), say=print) as checkpoints:
                train(
                    learner_of(model.shape, folder, steps=steps),
                    TrainTable(steps=steps, batch_size=model.rows),
                    batch_of=batches,
                    reporter=Quiet(),
                    checkpoints=checkpoints,
                )

    return work


def measure(args: argparse.Namespace) -> list[Row]:
    """Measure the group."""
    if args.quick:
        tiny = Model(name="tiny", rows=2, snapshots=2, rounds=1, shape=TINY)
        return list(rows_of(tiny))
    return [each for model in MODELS for each in rows_of(model)]


def rows_of(model: Model) -> Iterator[Row]:
    """Measure one model."""
    steps = model.snapshots * EVERY
    times = in_turns(
        {"every": training(model, EVERY, steps=steps), "last": training(model, 0, steps=steps)},
        rounds=model.rounds,
        warmup=int(model.rounds > 1),
    )
    # The training without them takes one snapshot as well, at its end.
    scale = model.snapshots / (model.snapshots - 1)

    def share(ours: list[float], without: list[float]) -> list[float]:
        return [100 * scale * (a / b - 1) for a, b in zip(ours, without, strict=True)]

    every, last = times["every"], times["last"]
    name = f"checkpoints of {model.name}: time that one every {EVERY} steps adds"
    yield row(f"{name}, by the clock", share(every.wall, last.wall), reach="<= 5", unit="%")
    yield row(f"{name}, CPU time of all threads", share(every.cpu, last.cpu), unit="%")


if __name__ == "__main__":
    main(measure, __doc__)
