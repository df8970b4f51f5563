"""Stage 1: trains the critic, and judges it on validation responses not used to choose its checkpoint.

Shape letters: B rows, T positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import define, field, fields
from numpy.typing import NDArray
from torch import Tensor, nn

from weighted_mtp_core.api import Batch, Critic, Split, is_correct
from weighted_mtp_core.checkpointing.best_model import load_component, save_component
from weighted_mtp_core.data.halves import HALVES, Half, documents_of
from weighted_mtp_core.data.samplers import evenly_spread, in_order
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.metrics.critic import ScoredResponses, aucs
from weighted_mtp_core.metrics.critic_gate import LEVEL, PROBLEMS_NEEDED, problems_by_outcome
from weighted_mtp_core.metrics.critic_report import CriticReport, report_critic
from weighted_mtp_core.metrics.slips import slips_of
from weighted_mtp_core.recipe.schema import CriticTable
from weighted_mtp_core.recipe.train_table import TrainTable
from weighted_mtp_core.runtime.device import bucket_bytes
from weighted_mtp_core.runtime.distributed import Distributed
from weighted_mtp_core.runtime.gradient_reduction import GradientReduction
from weighted_mtp_core.runtime.sharding import all_like
from weighted_mtp_core.training.critic_scores import critic_errors
from weighted_mtp_core.training.loop import Learner, StepResult, Validation
from weighted_mtp_core.training.micro_batches import micro_batches
from weighted_mtp_core.training.plugin_metrics import check_metrics
from weighted_mtp_core.training.prepare import Prepared


@define(kw_only=True, eq=False)
class CriticLearner(Learner):
    """Trains a critic; if the critic reads trunk states of the policy, the trunk gets no gradient.

    Attributes:
        critic: The critic to train.
        prepared: The data of the run, the device and the precision of computations, and the policy, whose
            trunk states a critic may read.
        table: The recipe's `[critic.train]`.
        distributed: The processes that train together.
        best: The folder of the best critic.
    """

    critic: Critic
    prepared: Prepared
    table: TrainTable
    distributed: Distributed
    best: Path
    stage: str = field(default="critic", init=False)
    loss_name: str = field(default="value_loss", init=False)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the critic's parameters that stage 1 trains."""
        return self.critic.parameters()

    def learn(self, batch: Batch, *, step: int) -> StepResult:
        """Accumulate the gradient of the critic's own loss; the result contains the loss of the batch.

        All rows of the data set count the same, because the gradient of a batch is proportional to its number
        of rows.
        """
        label = self.prepared.plan.critic_label
        with critic_errors(label):
            self.critic.begin_step(step, steps=self.table.steps)
        totals: dict[str, Tensor | float] = {}
        size = len(batch.ids_BT) / self.table.batch_size
        together = 2 if self.critic.batching == "pairs" else 1
        parts = micro_batches(batch, self.table.accumulation, self.distributed, together=together)
        with self._reduction() as reduction:
            for part in parts:
                states_BTH = self._states(part.batch)
                with critic_errors(label), self.prepared.compute.autocast():
                    result = self.critic.loss(part.batch, states_BTH)
                check_metrics(result.metrics, label=label)
                if part is parts[-1]:
                    reduction.begin()
                (result.loss * part.share * size).backward()  # type: ignore[no-untyped-call]
                for name, value in {self.loss_name: result.loss.detach(), **result.metrics}.items():
                    totals[name] = totals.get(name, 0.0) + part.share * value
        scalars = self.distributed.all_reduce_scalars(totals)
        return StepResult(loss=scalars[self.loss_name], metrics=lambda: scalars, size=size)

    def _reduction(self) -> GradientReduction:
        return GradientReduction(
            self.parameters(),
            last=self.parameters(),
            distributed=self.distributed,
            bucket_bytes=bucket_bytes(self.prepared.compute.device),
        )

    def validate(self, *, step: int) -> Validation:
        """Measure the critic on the validation half `choosing`; the score is the AUC of the final values."""
        del step
        report = self.measure("choosing")
        return Validation(metrics=report.metrics(), score=report.critic.auc)

    @torch.no_grad()
    def measure(self, half: Half) -> CriticReport:
        """Return the report on the current critic, measured on responses of one half of the validation split.

        Raises:
            RunFailedError: The critic fails, or returns no values, values that are not finite or a tensor
                that is not float32; or the measured responses are all correct or all incorrect.
        """
        scored = self._score("validation", self.prepared.critic_validation(half))
        return report_critic(scored, self.prepared.length_only)

    @torch.no_grad()
    def training_metrics(self) -> dict[str, float]:
        """Return AUCs on some training responses as metrics; empty if these are all correct or all incorrect.

        If the AUC on training responses is clearly higher than on held-out responses, the critic memorises.
        """
        tokens = self.prepared.critic_tokens("train")
        documents = evenly_spread(np.arange(len(tokens)), limit=self.table.validation_examples)
        return {
            f"critic_training_{name}": value for name, value in aucs(self._score("train", documents)).items()
        }

    def _score(self, split: Split, documents: NDArray[np.int64]) -> ScoredResponses:
        """Return the values of some labelled responses of a split."""
        parts, tokens = [], self.prepared.critic_tokens(split)
        size = self.table.batch_size // self.table.accumulation  # a micro-batch of training fits into memory
        for rows in in_order(tokens, documents, batch_size=size):
            batch = self.prepared.batch(tokens, rows)
            scores = self.prepared.scores(self.critic, batch, self._states(batch))
            values_BT = self.prepared.values(scores)
            if values_BT is None:
                raise RunFailedError(f"{self.prepared.plan.critic_label} was trained, but returns no values")
            slip_BT = slips_of(batch) if self.prepared.source.oracle_weights else None
            parts.append(_scored_responses(batch, values_BT, slip_BT, tokens.problem_D[rows]))
        return _concatenate(parts)

    def state_dict(self) -> Mapping[str, Any]:
        """Return the critic's state."""
        return self.critic.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.critic.load_state_dict(all_like(self.critic.state_dict(), state))

    def save_best(self) -> None:
        """Write the critic's state."""
        save_component(self.critic, self.best, distributed=self.distributed)

    def load_best(self) -> None:
        """Load the critic's state that `save_best` wrote."""
        load_component(self.critic, self.best)

    def check_problems(self, table: CriticTable, *, log: Callable[[str], None]) -> None:
        """Check that the validation split suffices to choose a checkpoint and to judge the critic.

        Raises:
            WmtpError: The responses that are measured in one half of the split are all correct or all
                incorrect; or responses to too few problems are measured in the half for judging, and
                `table.allow_uninformative_critic` is false.
        """
        tokens = self.prepared.critic_tokens("validation")
        halves = {half: self.prepared.critic_validation(half) for half in HALVES}
        cut = any(len(rows) < len(documents_of(half, tokens)) for half, rows in halves.items())
        mend = "raise `critic.train.validation_examples`" if cut else "add problems to the split"
        for half, rows in halves.items():
            right, wrong = problems_by_outcome(is_correct(tokens.reward_D[rows]), tokens.problem_D[rows])
            found = f"{right} with a correct response and {wrong} with an incorrect one"
            if not right or not wrong:
                raise WmtpError(
                    f"the split `validation` has too few problems: {found} in the half for {half}, and a "
                    "critic cannot be measured without both",
                    hint=mend,
                )
        if min(right, wrong) >= PROBLEMS_NEEDED:
            return
        fault = (
            f"the split `validation` has too few problems to tell a critic from a constant: {found} in the "
            f"half for judging, and {PROBLEMS_NEEDED} of each are needed"
        )
        if not table.allow_uninformative_critic:
            raise WmtpError(fault, hint=f"{mend}, or set `critic.allow_uninformative_critic = true`")
        log(f"WARNING: {fault}")

    @torch.no_grad()
    def _states(self, batch: Batch) -> Tensor | None:
        return self.prepared.trunk(batch) if self.critic.reads_policy else None


def check_informative(
    report: CriticReport, critic: str, table: CriticTable, *, log: Callable[[str], None]
) -> bool:
    """Return whether the critic is significantly better than a constant value, and log its measures.

    Raises:
        RunFailedError: The critic is not significantly better than a constant value, and
            `table.allow_uninformative_critic` is false.
    """
    if report.informative:
        losses = f"loss {report.critic.bce:.3f}, of a constant {report.constant.bce:.3f}"
        log(f"critic: {report.words}; {losses}")
        return True
    if report.fewest_problems < PROBLEMS_NEEDED:
        verdict = f"critic `{critic}` cannot be told from a constant with so few problems: {report.words}"
    else:
        p_value = f"p = {report.p_value:.2g}, expected at most {LEVEL}"
        verdict = f"critic `{critic}` is no better than a constant: {report.words}; {p_value}"
    if not table.allow_uninformative_critic:
        raise RunFailedError(
            verdict,
            hint="train it longer or on more data, or set `critic.allow_uninformative_critic = true`",
        )
    log(f"WARNING: {verdict}")
    return False


def _scored_responses(
    batch: Batch, values_BT: NDArray[np.float64], slip_BT: Tensor | None, problem_B: NDArray[np.int64]
) -> ScoredResponses:
    """Collect the values of a batch with one document per row; rows without a response are left out."""
    response_BT = batch.response_BT.cpu().numpy()
    rewards_BT = batch.reward_BT.cpu().double().numpy()
    length_B = response_BT.sum(axis=1)
    row_B = np.flatnonzero(length_B)
    first_B = response_BT.argmax(axis=1)[row_B]
    return ScoredResponses(
        value_N=values_BT[response_BT],
        before_D=values_BT[row_B, np.maximum(first_B - 1, 0)],
        length_D=length_B[row_B],
        reward_D=rewards_BT[row_B, first_B],
        problem_D=problem_B[row_B],
        slip_N=None if slip_BT is None else slip_BT.cpu().numpy()[response_BT],
    )


def _concatenate(parts: Sequence[ScoredResponses]) -> ScoredResponses:
    columns = {each.name: [getattr(p, each.name) for p in parts] for each in fields(ScoredResponses)}
    whole: dict[str, Any] = {
        name: None if column[0] is None else np.concatenate(column) for name, column in columns.items()
    }
    return ScoredResponses(**whole)
