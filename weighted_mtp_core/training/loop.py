"""The one training loop: stage 1 hands it the critic, stage 2 the policy."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from attrs import asdict, define, field, frozen
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weighted_mtp_core.api import Batch
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.checkpointing.snapshot import (
    Snapshot,
    load_optimiser_state,
    optimiser_state,
    random_state,
    restore_random_state,
    split_state,
)
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.recipe.schema import TrainTable
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed, clip_gradients
from weighted_mtp_core.runtime.interrupts import StopRequest
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.training.nonfinite_steps import NonfiniteSteps


@frozen(kw_only=True)
class Validation:
    """One validation: scalars to log, and the score (higher is better) that selects the best checkpoint."""

    metrics: Mapping[str, float]
    score: float


class Learner(ABC):
    """What the loop trains.

    Attributes:
        stage: `critic` or `policy`, as the journal names it.
        headline: The loss: shown while it trains, and a step where it is not finite is skipped.
        best: The file or folder that `save_best` writes.
    """

    stage: str
    loss_name: str
    best: Path

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
    def state_dict(self) -> Mapping[str, Any]:
        """Return tensors and plain values that a resumed training goes on from."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s result."""

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
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:  # the fused kernel takes no mixture of sharded and whole parameters
            key = parameter.ndim >= 2, isinstance(parameter, DTensor)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": table.weight_decay if is_matrix else 0.0}
            for (is_matrix, _), members in sorted(groups.items(), reverse=True)
        ],
        lr=table.learning_rate,
        betas=(0.9, 0.95),
        fused=True,  # also what makes skipping a step possible, see NonfiniteSteps
    )


def train(
    learner: Learner,
    table: TrainTable,
    *,
    batch_of: Callable[[int], Batch],
    reporter: Reporter,
    checkpoints: Checkpoints,
    resume: Snapshot | None = None,
    distributed: Distributed = SINGLE_PROCESS,
) -> Trained:
    """Optimise for `table.steps` steps and leave the learner at its best validated state.

    SIGINT and SIGTERM end it after the step, with a checkpoint; SIGUSR1 takes a checkpoint and goes on.

    Args:
        learner: The critic or the policy.
        table: Its optimisation.
        batch_of: The global batch of a step, from 0.
        reporter: Told every `log_every` steps and at each validation.
        checkpoints: Where snapshots go.
        resume: Where to go on from; None begins.
        distributed: The processes that train together.

    Raises:
        RunFailedError: Too many steps in a row had no finite loss or gradient, or a checkpoint failed.
        KeyboardInterrupt: A signal asked for the end.
    """
    training = _Training.begin(
        learner, table, batch_of=batch_of, reporter=reporter, checkpoints=checkpoints, distributed=distributed
    )
    first = training.validate(0) if resume is None else training.restore(resume)
    with StopRequest() as signals:
        for step in range(first, table.steps):
            training.step(step)
            done = step + 1
            if distributed.any_rank(flag=signals.requested):
                training.snapshot(done)
                checkpoints.wait()
                signals.stop()
            if checkpoints.due(done, table.steps) or distributed.any_rank(flag=signals.checkpoint_now):
                signals.checkpoint_now = False
                training.snapshot(done)
    checkpoints.wait()
    distributed.barrier()
    learner.load_best()
    return training.trained


@define(kw_only=True, eq=False)
class _Training:
    """The state of one `train`."""

    learner: Learner
    table: TrainTable
    batch_of: Callable[[int], Batch]
    reporter: Reporter
    checkpoints: Checkpoints
    distributed: Distributed
    parameters: list[nn.Parameter]
    optimiser: torch.optim.AdamW
    bad: NonfiniteSteps
    trained: Trained = field(init=False)
    clock: float = field(init=False, factory=time.perf_counter)
    tokens: int = field(init=False, default=0)
    copies: dict[str, Tensor] = field(init=False, factory=dict)

    @classmethod
    def begin(
        cls,
        learner: Learner,
        table: TrainTable,
        *,
        batch_of: Callable[[int], Batch],
        reporter: Reporter,
        checkpoints: Checkpoints,
        distributed: Distributed,
    ) -> _Training:
        parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        return cls(
            learner=learner,
            table=table,
            batch_of=batch_of,
            reporter=reporter,
            checkpoints=checkpoints,
            distributed=distributed,
            parameters=parameters,
            optimiser=make_optimiser(parameters, table),
            bad=NonfiniteSteps(limit=table.max_bad_steps, device=parameters[0].device),
        )

    def step(self, step: int) -> None:
        """Take one step, and log and validate where it is time to."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.table, step)
        batch = self.batch_of(step)
        self.tokens += batch.ids_BT.numel()
        scalars = self.learner.learn(batch, step=step)
        norm = clip_gradients(self.parameters, self.table.max_grad_norm)
        self.bad.skip_if_not_finite(self.optimiser, scalars[self.learner.loss_name], norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        done = step + 1
        if self.bad.too_many(done):
            self._give_up(done)
        if done % self.table.log_every == 0 or done == self.table.steps:
            self._log(done, {**scalars, f"{self.learner.stage}_gradient_norm": norm})
        if done % self.table.validate_every == 0 or done == self.table.steps:
            paused = time.perf_counter()
            self.validate(done)
            self.clock += time.perf_counter() - paused

    def validate(self, step: int) -> int:
        """Validate; keep the state if it is the best so far. Returns the step."""
        found = self.learner.validate(step=step)
        self.reporter.metrics(self.learner.stage, step, found.metrics)
        first = step == 0
        better = first or found.score > self.trained.best.score
        # The first process decides: scores of others may differ by rounding, and saving takes all of them.
        if self.distributed.any_rank(flag=better and self.distributed.is_rank_zero):
            self.checkpoints.wait()  # a snapshot on its way links the best state that it was taken with
            self.learner.save_best()
            start = found if first else self.trained.start
            self.trained = Trained(start=start, best_step=step, best=found)
        return step

    def snapshot(self, step: int) -> None:
        """Copy everything that the next step depends on; it is written while training goes on."""
        self.checkpoints.wait()  # what it writes is overwritten now
        learner, learner_values = split_state(self.learner.state_dict(), "learner", over=self.copies)
        moments = optimiser_state(self.optimiser, self.parameters)
        optimiser, _ = split_state(moments, "optimiser", over=self.copies)
        self.copies = {**learner, **optimiser}
        random, random_values = random_state()
        self.checkpoints.save(
            Snapshot(
                stage=self.learner.stage,
                step=step,
                tensors={**self.copies, **random},
                values={
                    "learner": learner_values,
                    "rng": random_values,
                    "trained": asdict(self.trained),
                    "bad": self.bad.state(),
                },
                best=self.learner.best,
            )
        )

    def restore(self, snapshot: Snapshot) -> int:
        """Put everything back to where a snapshot was taken; return how many steps are done."""
        self.learner.load_state_dict(snapshot.part("learner"))
        load_optimiser_state(self.optimiser, self.parameters, snapshot.part("optimiser"))
        restore_random_state(snapshot.tensors, snapshot.values["rng"])
        kept = snapshot.values["trained"]
        self.trained = Trained(
            start=Validation(**kept["start"]), best_step=kept["best_step"], best=Validation(**kept["best"])
        )
        self.bad.restore(snapshot.values["bad"])
        if self.distributed.is_rank_zero:
            snapshot.restore_best(self.learner.best)
        return snapshot.step

    def _log(self, done: int, scalars: Mapping[str, Tensor | float]) -> None:
        stage = self.learner.stage
        values = {name: float(value) for name, value in scalars.items()}
        values[f"{stage}_learning_rate"] = learning_rate(self.table, done - 1)
        values[f"{stage}_skipped_steps"] = float(self.bad.total)
        self.reporter.metrics(stage, done, values)
        rate = self.tokens / max(time.perf_counter() - self.clock, 1e-9)
        self.reporter.timings(stage, done, {f"{stage}_tokens_per_second": rate})
        loss_name = self.learner.loss_name
        self.reporter.progress(done, {loss_name: values[loss_name], "tokens/s": rate})
        self.clock, self.tokens = time.perf_counter(), 0

    def _give_up(self, done: int) -> None:
        """Name the examples of the steps that were skipped, and end the run."""
        steps = range(done - self.table.max_bad_steps, done)
        file = self.checkpoints.folder / "bad_steps.json"
        examples = {str(step + 1): self.batch_of(step).example_ids for step in steps}
        atomic_write(file, json.dumps(examples, indent=1, ensure_ascii=False) + "\n")
        raise RunFailedError(
            f"{len(steps)} steps in a row, up to step {done} of stage `{self.learner.stage}`, had no finite "
            f"loss and gradient; their examples are listed in `{file}`",
            hint="lower the learning rate, or look at those examples; `max_bad_steps` sets the limit",
        )
