"""Cost of checkpoints during training: ten steps that start with a checkpoint, against ten steps without.

    python benchmarks/checkpointing.py

The models are the micro model of the default recipes (8 rows of about 200 tokens per step) and a model with
the shape of SmolLM2-135M (1 row), trained with AdamW. Ten steps with and ten steps without a checkpoint
alternate in one training run on the same batch, so the checkpoint is the only difference. The first
checkpoint is not counted, because it allocates the buffers for the copies. The checkpoints need 6 GB in the
temporary folder (TMPDIR selects its disk). One thread trains and another writes. So the CPU time of all
threads is the cost on a machine without an idle core, and the wall time is the cost on a machine with two
cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from attrs import frozen
from harness import Row, Times, main, row
from humaneval_lengths import humaneval_tokens
from step import SMOLLM2, TINY
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Batch, BuildContext
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.data.batches import StepBatches
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.recipe.schema import CheckpointTable, DataTable, LossTable, MicroTable
from weighted_mtp_core.recipe.train_table import TrainTable
from weighted_mtp_core.training.loop import Learner, Validation, train
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

from weighted_mtp_baseline_mtp import UniformOptions, build_uniform

EVERY = 10


@frozen(kw_only=True)
class Model:
    """A model to train.

    Attributes:
        name: Name of the model in the table.
        rows: Number of rows per step.
        pairs: Number of comparisons of ten steps with and ten steps without a checkpoint.
        shape: Arguments of the model's LlamaConfig.
    """

    name: str
    rows: int
    pairs: int
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
    Model(name="micro", rows=8, pairs=9, shape=micro_shape()),
    Model(name="SmolLM2's shape", rows=1, pairs=3, shape=SMOLLM2),
)


class Quiet:
    """A reporter that discards what it receives."""

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Discard the metrics."""

    def timings(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Discard the timings."""

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Discard the progress."""


class Unvalidated(PolicyLearner):
    """Stage 2 without validations."""

    def validate(self, *, step: int) -> Validation:
        """Return the same score for every state, so that the best model is written once."""
        del step
        return Validation(metrics={}, score=0.0)


def learner_of(
    shape: Mapping[str, int], folder: Path, *, steps: int, pairs_per_step: Sequence[float]
) -> Learner:
    """Return the learner of stage 2 for a new model."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, tie_word_embeddings=True)
    policy = make_policy(LlamaForCausalLM(config), n_future=4, head_kind="parallel")
    best = folder / "best_model.pt"
    weighting = build_uniform(UniformOptions(), BuildContext(seed=0, storage=folder))
    return Unvalidated(
        policy=policy,
        weighting=Weighting(strategy=weighting, needs=frozenset(), critic=None, label="benchmark"),
        loss=LossTable(),
        steps=steps,
        pairs_per_step=pairs_per_step,
        accumulation=1,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=list,
        best=best,
    )


def times_of(model: Model) -> tuple[Times, Times]:
    """Train; return the times of ten steps after a checkpoint, and of ten steps without a checkpoint."""
    steps = 2 * EVERY * (model.pairs + 2)
    table = DataTable(use="benchmark")
    tokens = humaneval_tokens(model.shape["vocab_size"])
    batches = StepBatches(tokens, table, batch_size=model.rows, seed=0, device=torch.device("cpu"))
    batch = batches(0)
    wall, cpu = [], []

    def batch_of(_: int) -> Batch:
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
        return batch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Checkpoints(folder=folder, table=CheckpointTable(every=2 * EVERY), log=print) as checkpoints:
            train(
                learner_of(
                    model.shape, folder, steps=steps, pairs_per_step=batches.pairs_per_step(n_future=4)
                ),
                TrainTable(steps=steps, batch_size=model.rows),
                batch_of=batch_of,
                reporter=Quiet(),
                checkpoints=checkpoints,
            )
    with_checkpoint, without = Times(), Times()
    for pair in range(model.pairs):
        # A checkpoint is written before the next step requests its batch.
        first = 2 * EVERY * (pair + 2) - 1
        for times, begin in ((with_checkpoint, first), (without, first + EVERY)):
            times.wall.append(wall[begin + EVERY] - wall[begin])
            times.cpu.append(cpu[begin + EVERY] - cpu[begin])
    return with_checkpoint, without


def measure(args: argparse.Namespace) -> list[Row]:
    """Run this benchmark; return the rows of its table."""
    if args.quick:
        return list(rows_of(Model(name="tiny", rows=2, pairs=1, shape=TINY)))
    return [each for model in MODELS for each in rows_of(model)]


def rows_of(model: Model) -> Iterator[Row]:
    """Measure one model."""
    with_checkpoint, without = times_of(model)

    def share(ours: list[float], plain: list[float]) -> list[float]:
        return [100 * (a / b - 1) for a, b in zip(ours, plain, strict=True)]

    name = f"checkpoints of {model.name}: time that one every {EVERY} steps adds"
    yield row(f"{name}, by the clock", share(with_checkpoint.wall, without.wall), limit="<= 5", unit="%")
    yield row(f"{name}, CPU time of all threads", share(with_checkpoint.cpu, without.cpu), unit="%")


if __name__ == "__main__":
    main(measure, __doc__)
