"""The one training loop: stage 1 hands it the critic, stage 2 the policy."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from attrs import frozen
from torch import Tensor, nn

from weighted_mtp_core.api import Batch
from weighted_mtp_core.recipe.schema import TrainTable


@frozen(kw_only=True)
class Validation:
    """One validation: scalars to log, and the score (higher is better) that selects the best checkpoint."""

    metrics: Mapping[str, float]
    score: float


class Learner(ABC):
    """What the loop trains.

    Attributes:
        stage: `critic` or `policy`, as the journal names it.
        headline: The metric shown while it trains.
    """

    stage: str
    headline: str

    @abstractmethod
    def parameters(self) -> Iterable[nn.Parameter]:
        """Return what the optimiser may change."""

    @abstractmethod
    def learn(self, batch: Batch, *, step: int) -> Mapping[str, Tensor | float]:
        """Accumulate the gradient of one global batch; return scalars, read only when they are logged."""

    @abstractmethod
    def validate(self, *, step: int) -> Validation:
        """Measure on the validation split, changing nothing."""

    @abstractmethod
    def save_best(self) -> None:
        """Write the present state as the best one."""

    @abstractmethod
    def load_best(self) -> None:
        """Restore what `save_best` wrote last."""


class Reporter(Protocol):
    """What the loop tells about its progress."""

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Record scalars that are the same in every run of a recipe."""

    def timings(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Record wall-clock measurements."""

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Move the display."""


@frozen(kw_only=True)
class Trained:
    """How a training went: the validation before its first step, and that of the state that was kept."""

    start: Validation
    best_step: int
    best: Validation


def learning_rate(table: TrainTable, step: int) -> float:
    """Return the rate of a step (from 0): linear warm-up, then a cosine down to the final share.

    The cosine is that of SGDR (Loshchilov and Hutter 2017, eq. 5) with one period.
    """
    if step < table.warmup_steps:
        return table.learning_rate * (step + 1) / table.warmup_steps
    span = max(1, table.steps - table.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * (step - table.warmup_steps) / span))
    return table.learning_rate * (table.final_learning_rate + (1 - table.final_learning_rate) * share)


def make_optimiser(parameters: Iterable[nn.Parameter], table: TrainTable) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only: norms and biases have no scale to hold down."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": table.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=table.learning_rate,
        betas=(0.9, 0.95),
        fused=all(p.device.type in {"cpu", "cuda"} for p in trained),
    )


def train(
    learner: Learner, table: TrainTable, *, batch_of: Callable[[int], Batch], reporter: Reporter
) -> Trained:
    """Optimise for `table.steps` steps and leave the learner at its best validated state.

    Args:
        learner: The critic or the policy.
        table: Its optimisation.
        batch_of: The global batch of a step, from 0.
        reporter: Told every `log_every` steps and at each validation.
    """
    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimiser = make_optimiser(parameters, table)
    trained = _validate(learner, 0, reporter=reporter, before=None)
    clock, tokens = time.perf_counter(), 0
    for step in range(table.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(table, step)
        batch = batch_of(step)
        tokens += batch.ids_BT.numel()
        scalars = learner.learn(batch, step=step)
        gradient_norm = nn.utils.clip_grad_norm_(parameters, table.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        done = step + 1
        if done % table.log_every == 0 or done == table.steps:
            values = {name: float(value) for name, value in scalars.items()}
            values[f"{learner.stage}_learning_rate"] = learning_rate(table, step)
            values[f"{learner.stage}_gradient_norm"] = float(gradient_norm)
            reporter.metrics(learner.stage, done, values)
            rate = tokens / max(time.perf_counter() - clock, 1e-9)
            reporter.timings(learner.stage, done, {f"{learner.stage}_tokens_per_second": rate})
            reporter.progress(done, {learner.headline: values[learner.headline], "tokens/s": rate})
            clock, tokens = time.perf_counter(), 0
        if done % table.validate_every == 0 or done == table.steps:
            paused = time.perf_counter()
            trained = _validate(learner, done, reporter=reporter, before=trained)
            clock += time.perf_counter() - paused
    learner.load_best()
    return trained


def _validate(learner: Learner, step: int, *, reporter: Reporter, before: Trained | None) -> Trained:
    """Validate; keep the state if it is the best so far."""
    found = learner.validate(step=step)
    reporter.metrics(learner.stage, step, found.metrics)
    if before is not None and found.score <= before.best.score:
        return before
    learner.save_best()
    return Trained(start=found if before is None else before.start, best_step=step, best=found)
