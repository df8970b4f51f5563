"""The training loop of both stages: stage 1 trains the critic, stage 2 trains the policy."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from attrs import asdict, define, evolve, field, filters, frozen
from torch import Tensor, nn

from weighted_mtp_core.api import Batch
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.checkpointing.snapshot import Snapshot
from weighted_mtp_core.checkpointing.state import (
    copy_state,
    load_optimiser_state,
    optimiser_state,
    random_state,
    restore_random_state,
)
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.recipe.train_table import TrainTable
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed
from weighted_mtp_core.runtime.interrupts import StopRequest
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.training.batches_ahead import BatchesAhead
from weighted_mtp_core.training.nonfinite_steps import NonfiniteSteps
from weighted_mtp_core.training.optimisers import Part, clip_gradients, make_optimisers, set_learning_rate
from weighted_mtp_core.training.stage_cost import StageCost

Scalars = Mapping[str, Tensor | float]


@frozen(kw_only=True, eq=False)
class StepResult:
    """The result of one training step.

    Attributes:
        loss: The loss, a scalar.
        metrics: Returns scalars of the step to log; called only if the step is logged.
        size: The amount of data in the step, divided by the amount in a typical step; positive.
    """

    loss: Tensor | float
    metrics: Callable[[], Scalars]
    size: Tensor | float = 1.0


@frozen(kw_only=True)
class Validation:
    """A validation result.

    Attributes:
        metrics: Scalars to log.
        score: The number that selects the checkpoint. Higher is better, so a loss is negated.
        measure: Name of the score without its sign, for the summary of stage 2; unused in stage 1.
    """

    metrics: Mapping[str, float]
    score: float
    measure: str = "held-out loss"


class Learner(ABC):
    """A model to train, with its loss and its validation.

    Attributes:
        stage: `critic` or `policy`, the stage's name in the journal.
        loss_name: Name of the metric that contains the loss; the progress display shows this metric.
        matrix_rate: Operations per second of a large matrix product, see `runtime/cost.py`; None if it was
            not measured.
        best: The file or folder that `save_best` writes.
    """

    stage: str
    loss_name: str
    matrix_rate: float | None = None
    best: Path

    @abstractmethod
    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the model's parameters; those without a gradient may be left out and are not optimised."""

    def parts(self) -> Mapping[nn.Parameter, Part]:
        """Return the parts of the model with a learning rate of their own, by parameter; by default none."""
        return {}

    def embeddings(self) -> Collection[nn.Parameter]:
        """Return the parameters that are known to be embeddings or unembeddings; by default none."""
        return ()

    def flops(self, batch: Batch) -> float:
        """Return the number of floating-point operations of a step with this global batch; 0 if unknown."""
        del batch
        return 0.0

    @abstractmethod
    def learn(self, batch: Batch, *, step: int) -> StepResult:
        """Accumulate the gradient of one global batch; `step` is 0-based."""

    @abstractmethod
    def validate(self, *, step: int) -> Validation:
        """Measure the model on validation examples, without changing the result of `state_dict`."""

    @abstractmethod
    def state_dict(self) -> Mapping[str, Any]:
        """Return the learner's tensors and plain values from which a resumed run continues."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`."""

    @abstractmethod
    def save_best(self) -> None:
        """Write the current state as the best state so far."""

    @abstractmethod
    def load_best(self) -> None:
        """Restore the state that the last call of `save_best` wrote."""


class Reporter(Protocol):
    """Records the loop's progress."""

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Record scalars that do not depend on the speed of the machine."""

    def timings(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Record measurements of speed and memory, which differ between machines."""

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Update the progress display."""


@frozen(kw_only=True)
class Trained:
    """The result of training a stage.

    Attributes:
        start: The validation before the first step.
        best_step: Number of steps after which the state was best; the best state is kept.
        best: The validation of the best state.
        last_step: Number of completed steps.
        steps: Number of planned steps.
    """

    start: Validation
    best_step: int
    best: Validation
    last_step: int = 0
    steps: int = 0

    def summary(self) -> list[tuple[str, str]]:
        """Return the line of the run's summary on stage 2, with the first and the best validation measure."""
        before, after = abs(self.start.score), abs(self.best.score)
        text = f"{self.best.measure} {before:.3f} -> {after:.3f} at step {self.best_step}"
        if self.last_step < self.steps:
            text += f"; stopped early after step {self.last_step} of {self.steps}"
        return [("policy", text)]


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
    """Train for `table.steps` steps, then restore the learner's state with the best validation score.

    If `table.patience` is set, training ends early after this number of consecutive validations without a
    better score (early stopping, Prechelt 1998).

    After SIGINT, SIGTERM or SIGHUP, training stops after the current step with a checkpoint. After SIGUSR1, a
    checkpoint is written and training continues; if SIGUSR1 arrived before training, the checkpoint is
    written after the first step.

    Args:
        learner: The critic or the policy.
        table: The recipe's options for this stage.
        batch_of: Returns the global batch of a step, counted from 0.
        reporter: Receives metrics every `log_every` steps, at each validation and after the last step.
        checkpoints: Writes the snapshots.
        resume: The snapshot to continue from; None starts at step 0.
        distributed: The processes that train together.

    Raises:
        WmtpError: The snapshot `resume` does not fit the learner.
        RunFailedError: Too many consecutive steps had a non-finite loss or gradient, no validation had a
            finite score, a plugin failed, or a checkpoint could not be written.
        KeyboardInterrupt: A signal requested a stop.
    """
    device = next(iter(learner.parameters())).device
    batches = BatchesAhead(batch_of, table.steps, device)
    training = _Training(learner, table, batches, reporter, checkpoints, distributed)
    first = training.validate(0) if resume is None else training.restore(resume)
    training.cost.begin()  # the first validation is not part of the cost
    with StopRequest() as signals:
        done = first
        while not training.ends(done):
            training.step(done)
            done += 1
            if distributed.any_rank(flag=signals.requested):
                training.take_snapshot(done)
                checkpoints.wait()
                signals.stop()
            last = done if training.ends(done) else table.steps
            if checkpoints.due(done, last) or distributed.any_rank(flag=signals.checkpoint_requested):
                signals.forget_checkpoint_request()
                training.take_snapshot(done)
    checkpoints.wait()
    distributed.barrier()
    if not math.isfinite(training.trained.best.score):
        raise RunFailedError(
            f"no validation of stage `{learner.stage}` gave a finite score, so there is no best state: "
            f"the first gave {training.trained.start.score}",
            hint="lower the learning rate, or give the split `validation` responses with tokens to predict",
        )
    learner.load_best()
    return evolve(training.trained, last_step=done, steps=table.steps)


@define(eq=False)
class _Training:
    """The state of one call of `train`."""

    learner: Learner
    table: TrainTable
    batches: BatchesAhead
    reporter: Reporter
    checkpoints: Checkpoints
    distributed: Distributed
    parameters: list[nn.Parameter] = field(init=False)
    optimisers: list[torch.optim.Optimizer] = field(init=False)
    rates: Mapping[str, float] = field(init=False, factory=dict)
    nonfinite: NonfiniteSteps = field(init=False)
    trained: Trained = field(init=False)
    cost: StageCost = field(init=False)
    copies: dict[str, Tensor] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        self.parameters = [each for each in self.learner.parameters() if each.requires_grad]
        self.optimisers = make_optimisers(
            self.parameters,
            self.table,
            parts=self.learner.parts(),
            embeddings=self.learner.embeddings(),
        )
        device = self.parameters[0].device
        self.nonfinite = NonfiniteSteps(limit=self.table.max_bad_steps, device=device)
        self.cost = StageCost(
            stage=self.learner.stage,
            device=device,
            matrix_rate=self.learner.matrix_rate,
            distributed=self.distributed,
        )

    def ends(self, done: int) -> bool:
        """Return whether training ends after `done` steps, as planned or because `patience` is exhausted."""
        if done >= self.table.steps or self.table.patience is None:
            return done >= self.table.steps
        every = self.table.validate_every
        return done // every - self.trained.best_step // every >= self.table.patience

    def step(self, step: int) -> None:
        """Execute one training step; log metrics if they are due, and validate if a validation is due."""
        self.rates = set_learning_rate(self.optimisers, self.table, step)
        batch = self.batches(step)
        if not self.distributed.is_single_process:
            # The processes draw different numbers of random values for dropout, but a snapshot contains only
            # the first process's generators. So each step begins with the same new seed in all processes.
            torch.manual_seed(torch.initial_seed() + 1)
        self.cost.add(tokens=batch.ids_BT.numel(), flops=self.learner.flops(batch))
        result = self.learner.learn(batch, step=step)
        norm = clip_gradients(self.parameters, self.table.max_grad_norm, size=result.size)
        self.nonfinite.skip_if_not_finite(self.optimisers, result.loss, norm)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        done = step + 1
        self.batches.prepare(done)
        if self.nonfinite.too_many(done):
            self._give_up(done)
        logged = done % self.table.log_every == 0 or done == self.table.steps
        if logged:
            self._log(done, result, norm)
        if done % self.table.validate_every == 0 or done == self.table.steps:
            with self.cost.pause():
                self.validate(done)
        if self.ends(done) and not logged:
            self._log(done, result, norm)

    def validate(self, step: int) -> int:
        """Validate after `step` steps, and save the state if it is the best so far; return `step`."""
        found = self.learner.validate(step=step)
        self.reporter.metrics(self.learner.stage, step, found.metrics)
        first = step == 0
        better = first or _beats(found.score, self.trained.best.score)
        # The first process decides for all: scores may differ by rounding errors between processes, but all
        # processes must save together, because saving is a collective operation.
        if self.distributed.any_rank(flag=better and self.distributed.is_rank_zero):
            self.checkpoints.wait()  # a snapshot that is being written links to the previous best state
            with self.checkpoints.writing(self.learner.best):
                self.learner.save_best()
            start = found if first else self.trained.start
            self.trained = Trained(start=start, best_step=step, best=found)
        return step

    def take_snapshot(self, step: int) -> None:
        """Copy everything that the next step depends on; the copy is written while training continues."""
        self.checkpoints.wait()  # because the new copy overwrites the previous copy in memory
        learner, learner_values = copy_state(self.learner.state_dict(), "learner", over=self.copies)
        state = optimiser_state(self.optimisers, self.parameters)
        optimiser, _ = copy_state(state, "optimiser", over=self.copies)
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
                    "trained": asdict(self.trained, filter=filters.exclude("last_step", "steps")),
                    "nonfinite_steps": self.nonfinite.state(),
                },
                best=self.learner.best,
            )
        )

    def restore(self, snapshot: Snapshot) -> int:
        """Restore the state of a snapshot; return the number of completed steps."""
        self.learner.load_state_dict(snapshot.part("learner"))
        load_optimiser_state(self.optimisers, self.parameters, snapshot.part("optimiser"))
        restore_random_state(snapshot.tensors, snapshot.values["rng"])
        kept = snapshot.values["trained"]
        self.trained = Trained(
            start=Validation(**kept["start"]), best_step=kept["best_step"], best=Validation(**kept["best"])
        )
        self.nonfinite.restore(snapshot.values["nonfinite_steps"])
        if self.distributed.is_rank_zero:
            snapshot.restore_best(self.learner.best)
        return snapshot.step

    def _log(self, done: int, result: StepResult, norm: Tensor) -> None:
        stage, loss_name = self.learner.stage, self.learner.loss_name
        scalars = {loss_name: result.loss, **result.metrics(), f"{stage}_gradient_norm": norm}
        values = {name: float(value) for name, value in scalars.items()}
        first, *others = sorted(self.rates)  # "" (parameters without a part) sorts first
        values[f"{stage}_learning_rate"] = self.rates[first]
        values |= {f"{stage}_{part}_learning_rate": self.rates[part] for part in others}
        values[f"{stage}_skipped_steps"] = float(self.nonfinite.total)
        self.reporter.metrics(stage, done, values)
        cost = self.cost.read()
        self.reporter.timings(stage, done, cost)
        shown = {loss_name: values[loss_name], "tokens/s": cost[f"{stage}_tokens_per_second"]}
        self.reporter.progress(done, shown)

    def _give_up(self, done: int) -> None:
        """Write the example ids of the last skipped steps to a file, and raise an error that ends the run."""
        steps = range(done - self.table.max_bad_steps, done)
        file = self.checkpoints.folder / "bad_steps.json"
        examples = {str(step + 1): self.batches(step).example_ids for step in steps}
        atomic_write(file, json.dumps(examples, indent=1, ensure_ascii=False) + "\n")
        raise RunFailedError(
            f"{len(steps)} steps in a row, up to step {done} of stage `{self.learner.stage}`, had no finite "
            f"loss and gradient; their examples are listed in `{file}`",
            hint="lower the learning rate, or look at those examples; `max_bad_steps` sets the limit",
        )


def _beats(score: float, best: float) -> bool:
    """Return whether `score` is better than `best`; any finite score is better than a non-finite score."""
    return math.isfinite(score) and not (math.isfinite(best) and score <= best)
