"""Peak memory of training with adapters, on the shape of SmolLM2-135M, and whether the held-out loss falls.

    python benchmarks/adapters.py

B = 1, T = 256, 40 % of the tokens supervised, AdamW, random weights, `parallel` heads, K = 4. The peak
contains the parameters and the activations, gradients and AdamW moments of two steps. Training documents and
held-out documents have tokens from the same skewed distribution. The benchmark needs the plugin
`baseline_mtp` and 4 GB of memory.

Shape letters: B rows, T positions, K heads.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from attrs import frozen
from harness import MIB, Row, main, peak_mib, return_freed_memory, row
from step import SMOLLM2, SUPERVISED, TINY
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Batch, BuildContext, ModelContext
from weighted_mtp_core.data.batches import collate
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.model.adapters import adapt
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.trunk import frozen_trunk
from weighted_mtp_core.recipe.schema import AdaptersTable, BaseDtype, LossTable, ModelTable
from weighted_mtp_core.recipe.train_table import TrainTable
from weighted_mtp_core.training.optimisers import clip_gradients, make_optimisers
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

from weighted_mtp_baseline_mtp import UniformOptions, build_uniform

K, STEPS, HELD_OUT = 4, 20, 4


@frozen
class Adapted:
    """Settings of adapters: the dtype of the base model, and whether heads 2..K are whole or adapted."""

    base_dtype: BaseDtype
    heads: Literal["whole", "adapted"]


def new_policy(shape: Mapping[str, int], adapted: Adapted | None) -> Policy:
    """Return a policy with random weights; without `adapted`, it has no adapters and trains everything."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=2048)
    policy = make_policy(LlamaForCausalLM(config), n_future=K, head_kind="parallel")
    if adapted is not None:
        table = AdaptersTable(heads=adapted.heads)
        adapt(policy, ModelTable(train="adapters", base_dtype=adapted.base_dtype, adapters=table))
    return policy


def documents(shape: Mapping[str, int], positions: int, *, count: int) -> TokenSet:
    """Return documents whose tokens follow Zipf's law; the last 40 % of each document are the response."""
    share_V = 1 / np.arange(1, shape["vocab_size"] + 1)
    ids_N = np.random.default_rng(0).choice(
        shape["vocab_size"], size=count * positions, p=share_V / share_V.sum()
    )
    return TokenSet(
        ids_N=ids_N.astype(np.int32),
        start_D1=np.arange(count + 1) * positions,
        prompt_D=np.full(count, round(positions * (1 - SUPERVISED)), dtype=np.int32),
        reward_D=np.ones(count, dtype=np.float32),
        problem_D=np.arange(count),
        example_ids=[str(d) for d in range(count)],
    )


def training(
    policy: Policy, shape: Mapping[str, int], positions: int
) -> tuple[PolicyLearner, Callable[[int], None]]:
    """Return a learner that validates on held-out documents, and a function that runs a training step."""
    tokens = documents(shape, positions, count=STEPS + HELD_OUT)

    def batch(number: int) -> Batch:
        return collate(tokens, np.array([number]), device=torch.device("cpu"))

    def held_out() -> Iterator[Batch]:
        return (batch(number) for number in range(STEPS, STEPS + HELD_OUT))

    model = ModelContext(
        n_future=K,
        hidden_size=policy.hidden_size,
        vocab_size=policy.vocab_size,
        device=torch.device("cpu"),
        frozen_trunk=partial(frozen_trunk, policy),
    )
    with tempfile.TemporaryDirectory() as scratch:
        context = BuildContext(seed=0, storage=Path(scratch), model=model)
        uniform = build_uniform(UniformOptions(), context)
    learner = PolicyLearner(
        policy=policy,
        weighting=Weighting(strategy=uniform, needs=frozenset(), critic=None, label="benchmark"),
        loss=LossTable(),
        steps=STEPS,
        pairs_per_step=(positions * SUPERVISED,) * K,
        accumulation=1,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=held_out,
        best=Path("unused"),
    )
    parameters = [each for each in policy.parameters() if each.requires_grad]
    (optimiser,) = make_optimisers(parameters, TrainTable(learning_rate=1e-3))

    def step(number: int) -> None:
        learner.learn(batch(number), step=number)
        clip_gradients(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return learner, step


def prepare_two_steps(
    shape: Mapping[str, int], positions: int, adapted: Adapted | None
) -> Callable[[], object]:
    """Return a function that trains a new model for two steps, for `peak_mib`.

    There are two steps because AdamW creates its moments only at the end of the first step. Freed memory is
    not counted, because the gaps between the many small gradients depend on glibc.
    """
    return_freed_memory()
    for number in range(2):  # training a tiny model first loads what is loaded lazily
        training(new_policy(TINY, adapted), TINY, 16)[1](number)
    _, step = training(new_policy(shape, adapted), shape, positions)
    return lambda: [step(0), step(1)]


def peak(shape: Mapping[str, int], positions: int, adapted: Adapted | None) -> float:
    """Return the peak memory in MiB: the parameters, and what two steps need in addition."""
    stored = sum(each.nbytes for each in new_policy(shape, adapted).parameters())
    return stored / MIB + peak_mib(prepare_two_steps, shape, positions, adapted)


def held_out_loss(shape: Mapping[str, int], positions: int) -> Row:
    """Return the row of the held-out loss of head 1 after 20 steps, divided by the loss before training."""
    learner, step = training(new_policy(shape, Adapted("float32", "whole")), shape, positions)
    found = []
    for number in range(STEPS + 1):
        if number in (0, STEPS):
            learner.policy.eval()
            found.append(learner.validate(step=number).metrics["validation_ce_head_1"])
            learner.policy.train()
        if number < STEPS:
            step(number)
    return row(
        f"adapters: held-out loss after {STEPS} steps over before",
        [found[1] / found[0]],
        limit="<= 0.95",
        unit="x",
        note=f"{found[0]:.2f} and {found[1]:.2f} nats",
    )


def measure(args: argparse.Namespace) -> list[Row]:
    """Run this benchmark; return the rows of its table."""
    shape, positions = (TINY, 32) if args.quick else (SMOLLM2, 256)
    everything = peak(shape, positions, None)
    rows = []
    limits = {
        Adapted("float32", "adapted"): "<= 0.45",
        Adapted("float32", "whole"): "<= 0.45",
        Adapted("bfloat16", "whole"): "",
        Adapted("nf4", "whole"): "",
    }
    for adapted, limit in limits.items():
        own = peak(shape, positions, adapted)
        setting = f"base in {adapted.base_dtype}, heads 2..{K} {adapted.heads}"
        name = f"adapters: peak memory of rank 8, {setting}, over training everything"
        note = f"{own:.0f} and {everything:.0f} MiB"
        rows.append(row(name, [own / everything], limit=limit, unit="x", note=note))
    return [*rows, held_out_loss(shape, positions)]


if __name__ == "__main__":
    main(measure, __doc__)
