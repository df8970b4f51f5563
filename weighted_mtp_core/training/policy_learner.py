"""Stage 2: weighted multi-token training of the policy.

Shape letters: B rows, T positions, K heads, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import define, evolve, field, frozen
from numpy.typing import NDArray
from torch import Tensor, nn

from weighted_mtp_core.api import Batch, Critic, Scores, Signal, StepView, WeightingStrategy, Weights
from weighted_mtp_core.api.alignment import align_weights
from weighted_mtp_core.checkpointing.snapshot import below, load_module_state, module_state
from weighted_mtp_core.data.batches import preceding, split_rows
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.messages import reason
from weighted_mtp_core.model.loss import normalisers, weighted_mtp_loss
from weighted_mtp_core.model.loss_shares import loss_shares
from weighted_mtp_core.model.pair_predictions import HeadSums, PairPredictions
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import IGNORED, align_labels, target_mask
from weighted_mtp_core.recipe.schema import LossTable
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed
from weighted_mtp_core.training.loop import Learner, Validation
from weighted_mtp_core.training.weight_checks import ValueCheck, check_weights, weight_metrics


@frozen(kw_only=True, eq=False)
class Arm:
    """What makes one training differ from another: the weighting, the signals it reads, the critic.

    Attributes:
        weighting: Called once a step with the whole global batch.
        needs: The signals that the weighting declared.
        critic: Fills the needed signals that the core does not know itself.
        label: Names the weighting in messages: address, plugin, distribution and version.
    """

    weighting: WeightingStrategy
    needs: frozenset[Signal]
    critic: Critic | None
    label: str

    @property
    def scores(self) -> bool:
        """Whether the critic is asked at each step."""
        return self.critic is not None and bool(self.needs & {Signal.VALUE, Signal.REFERENCE_LOSS})

    def weigh(self, view: StepView) -> Weights:
        """Ask the weighting, and check what it says, but for the values.

        Raises:
            RunFailedError: It failed, or its weights are none; says whose fault that is.
        """
        try:
            weights = self.weighting.weigh(view)
        except WmtpError as error:
            raise RunFailedError(f"{self.label} failed: {error}", hint=error.hint) from error
        except Exception as error:
            raise RunFailedError(f"{self.label} failed: {reason(error)}") from error
        check_weights(weights, view.response_BT, n_future=view.n_future, label=self.label)
        return weights


@define(kw_only=True, eq=False)
class PolicyLearner(Learner):
    """Trains trunk, heads and unembedding on weighted multi-token losses.

    Attributes:
        policy: What is trained.
        arm: Where the weights come from.
        loss: Normalisation, the heads' shares and what they may shape.
        steps: How many there are in all, which head schedules go by.
        accumulation: In how many parts the global batch goes through the policy.
        distributed: The processes that train together.
        autocast: Makes the context of each forward pass (bf16 on devices that like it).
        validation: Batches of the validation split, made anew at each call.
        best: The file of the best policy.
        save: Writes the policy as the best one.
        restore: Loads it back.
    """

    policy: Policy
    arm: Arm
    loss: LossTable
    steps: int
    accumulation: int
    distributed: Distributed = SINGLE_PROCESS
    autocast: Callable[[], torch.autocast]
    validation: Callable[[], Iterable[Batch]]
    best: Path
    save: Callable[[], None]
    restore: Callable[[], None]
    stage: str = field(default="policy", init=False)
    loss_name: str = field(default="train_loss", init=False)
    _values: ValueCheck = field(init=False)

    @_values.default
    def _check_values(self) -> ValueCheck:
        return ValueCheck(label=self.arm.label)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the policy's parameters."""
        return self.policy.parameters()

    def learn(self, batch: Batch, *, step: int) -> Mapping[str, Tensor | float]:
        """Weigh the whole batch, then send its parts through the fused loss.

        The weights need the global batch (whitening, `Z_k`), so parts whose signals need the trunk run
        twice when the batch is accumulated; a batch in one part runs once.
        """
        self.policy.train()
        n_future = self.policy.n_future
        parts = self._parts(batch)
        states = [self._trunk(parts[0].batch)] if len(parts) == 1 else [None] * len(parts)
        labels_BTK = self._labels(batch)
        target_BTK = target_mask(labels_BTK)
        signals = self._signals(parts, states, rows=len(batch.ids_BT))
        view = self._view(batch, target_BTK, signals, step=step, training=True)
        weights = self.arm.weigh(view)
        self._values.note(weights.weight)
        if self._values.due(step, self.steps):
            self._values.look()
        weight_BTK = align_weights(weights.weight, target_BTK)
        normaliser_K = normalisers(weight_BTK, target_BTK, normalise=self.loss.normalise)
        share_K = loss_shares(self.loss, n_future, progress=step / self.steps)
        share_K = share_K.to(normaliser_K.device, non_blocking=True)
        total = torch.zeros((), device=normaliser_K.device)
        ce_K = torch.zeros_like(normaliser_K)
        count_K = torch.zeros_like(normaliser_K)
        for part, known in zip(parts, states, strict=True):
            with self.autocast():
                hidden_BTH = self._trunk(part.batch) if known is None else known
                result = weighted_mtp_loss(
                    self.policy,
                    hidden_BTH,
                    labels_BTK=part.of(labels_BTK, nothing=IGNORED),
                    weight_BTK=part.of(weight_BTK, nothing=0),
                    normaliser_K=normaliser_K,
                    head_share_K=share_K,
                    detach_trunk=self.loss.detach_trunk,
                    position_BT=part.batch.position_BT,
                    preceding_BT=part.preceding_BT,
                )
            total += result.loss
            ce_K += result.ce_sum_K
            count_K += result.count_K
        self.distributed.all_reduce_gradients(self.parameters())
        self.distributed.all_reduce(total, ce_K, count_K)
        return {
            "train_loss": total,
            **_per_head("train_ce", ce_K / count_K.clamp(min=1)),
            **weight_metrics(weight_BTK, target_BTK, preceding_BT=preceding(batch)),
            **weights.metrics,
        }

    @torch.no_grad()
    def validate(self, *, step: int) -> Validation:
        """Measure unweighted cross-entropy and accuracy of each head; head 1's selects the checkpoint."""
        del step
        ce_K, accuracy_K = head_quality(self.policy, self.validation(), autocast=self.autocast)
        return Validation(
            metrics={
                name: float(value)
                for name, value in (
                    _per_head("validation_ce", ce_K) | _per_head("validation_accuracy", accuracy_K)
                ).items()
            },
            score=-float(ce_K[0]),
        )

    @torch.no_grad()
    def weigh(self, batch: Batch, *, step: int) -> Weights:
        """Return the weights of a batch that is looked at, as one global batch, and not learnt from."""
        self.policy.eval()
        parts = self._parts(batch)
        signals = self._signals(parts, [None] * len(parts), rows=len(batch.ids_BT))
        target_BTK = target_mask(self._labels(batch))
        weights = self.arm.weigh(self._view(batch, target_BTK, signals, step=step, training=False))
        self._values.note(weights.weight)
        self._values.look()
        self.policy.train()
        return weights

    def state_dict(self) -> Mapping[str, Any]:
        """Return the policy's parameters and what the weighting keeps.

        Raises:
            RunFailedError: Some weights since the last look were bad: what they made is not to be kept.
        """
        self._values.look()
        policy = {f"policy.{name}": tensor for name, tensor in module_state(self.policy).items()}
        weighting = {f"weighting.{name}": value for name, value in self.arm.weighting.state_dict().items()}
        return policy | weighting

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s result."""
        load_module_state(self.policy, below(state, "policy"))
        self.arm.weighting.load_state_dict(below(state, "weighting"))

    def save_best(self) -> None:
        """Write the policy's weights."""
        self.save()

    def load_best(self) -> None:
        """Load them back."""
        self.restore()

    def _labels(self, batch: Batch) -> Tensor:
        return align_labels(
            batch.ids_BT,
            document_BT=batch.document_BT,
            response_BT=batch.response_BT,
            n_future=self.policy.n_future,
        )

    def _trunk(self, batch: Batch) -> Tensor:
        with self.autocast():
            return self.policy.trunk_states(batch.ids_BT, position_BT=batch.position_BT)

    @torch.no_grad()
    def _signals(self, parts: Sequence[_Part], states: Sequence[Tensor | None], *, rows: int) -> _Signals:
        """Compute the signals that the weighting needs, for the rows of the global batch."""
        scores: list[Scores] = []
        asked = {signal: read for signal, read in _OF_THE_POLICY.items() if signal in self.arm.needs}
        own: dict[Signal, list[Tensor]] = {signal: [] for signal in _OF_THE_POLICY}
        for part, known in zip(parts, states, strict=True):
            reads = self.arm.critic is not None and self.arm.scores and self.arm.critic.reads_policy
            hidden_BTH = known
            if hidden_BTH is None and (reads or asked):
                hidden_BTH = self._trunk(part.batch)
            if self.arm.critic is not None and self.arm.scores:
                state = hidden_BTH.detach().float() if reads and hidden_BTH is not None else None
                scores.append(self.arm.critic.score(part.batch, state))
            if asked and hidden_BTH is not None:
                predictions = PairPredictions(
                    self.policy,
                    hidden_BTH.detach(),
                    self._labels(part.batch),
                    position_BT=part.batch.position_BT,
                    preceding_BT=preceding(part.batch),
                )
                for signal, read in asked.items():
                    with self.autocast():
                        own[signal].append(read(predictions))
        return _Signals(
            value_BT=self._everywhere(parts, [score.value_BT for score in scores], rows),
            reference_loss_BT=self._everywhere(parts, [score.reference_loss_BT for score in scores], rows),
            token_loss_BTK=self._everywhere(parts, own[Signal.TOKEN_LOSS], rows),
            token_entropy_BTK=self._everywhere(parts, own[Signal.TOKEN_ENTROPY], rows),
        )

    def _everywhere(
        self, parts: Sequence[_Part], values: Sequence[Tensor | None], rows: int
    ) -> Tensor | None:
        """Lay the values of this process's parts, and of all others, into the rows of the global batch."""
        known = [(part, value) for part, value in zip(parts, values, strict=False) if value is not None]
        if not known:
            return None
        first = known[0][1]
        laid = first.new_zeros((rows, *first.shape[1:]))
        for part, value in known:
            if part.counts:
                laid[part.rows] = value
        self.distributed.all_reduce(laid)
        return laid

    def _parts(self, batch: Batch) -> list[_Part]:
        """Return this process's parts of the global batch; as many as any other's, so that all keep step."""
        parts, first = [], 0
        for part in split_rows(batch, self.accumulation * self.distributed.size):
            rows = slice(first, first + len(part.ids_BT))
            parts.append(_Part(rows=rows, batch=part, counts=True))
            first = rows.stop
        return self.distributed.shard_evenly(parts, spare=evolve(parts[0], counts=False))

    def _view(
        self, batch: Batch, target_BTK: Tensor, signals: _Signals, *, step: int, training: bool
    ) -> StepView:
        needs = self.arm.needs
        return StepView(
            ids_BT=batch.ids_BT,
            document_BT=batch.document_BT,
            response_BT=batch.response_BT,
            target_BTK=target_BTK,
            n_future=self.policy.n_future,
            step=step,
            training=training,
            reward_BT=batch.reward_BT if Signal.REWARD in needs else None,
            group_BT=batch.group_BT if Signal.GROUP in needs else None,
            value_BT=signals.value_BT if Signal.VALUE in needs else None,
            token_loss_BTK=signals.token_loss_BTK,
            token_entropy_BTK=signals.token_entropy_BTK,
            reference_loss_BT=signals.reference_loss_BT if Signal.REFERENCE_LOSS in needs else None,
        )


@frozen(kw_only=True, eq=False)
class _Part:
    """Some rows of the global batch; `counts` is False for a stand-in with nothing to learn from."""

    rows: slice
    batch: Batch
    counts: bool

    def of(self, tensor: Tensor, *, nothing: float) -> Tensor:
        """Return these rows of a tensor of the global batch."""
        return tensor[self.rows] if self.counts else torch.full_like(tensor[self.rows], nothing)

    @property
    def preceding_BT(self) -> NDArray[np.int64] | None:
        """Which pairs of these rows count, see `CollatedBatch.preceding_BT`."""
        preceding_BT = preceding(self.batch)
        return preceding_BT if self.counts or preceding_BT is None else np.zeros_like(preceding_BT)


@frozen(kw_only=True, eq=False)
class _Signals:
    value_BT: Tensor | None
    reference_loss_BT: Tensor | None
    token_loss_BTK: Tensor | None
    token_entropy_BTK: Tensor | None


# What the policy itself is asked for, in a pass of its own before the weighted one.
_OF_THE_POLICY = {
    Signal.TOKEN_LOSS: PairPredictions.losses,
    Signal.TOKEN_ENTROPY: PairPredictions.entropies,
}


def _per_head(name: str, value_K: Tensor) -> dict[str, Tensor]:
    return {f"{name}_head_{k + 1}": value for k, value in enumerate(value_K.unbind())}


@torch.no_grad()
def head_quality(
    policy: Policy, batches: Iterable[Batch], *, autocast: Callable[[], torch.autocast]
) -> tuple[Tensor, Tensor]:
    """Return unweighted cross-entropy and top-1 accuracy of each head over all targets of the batches.

    Returns:
        `ce_K` (nats a target) and `accuracy_K`, float32; 0 for a head without targets.
    """
    policy.eval()
    sums: list[HeadSums] = []
    for batch in batches:
        labels_BTK = align_labels(
            batch.ids_BT,
            document_BT=batch.document_BT,
            response_BT=batch.response_BT,
            n_future=policy.n_future,
        )
        with autocast():
            hidden_BTH = policy.trunk_states(batch.ids_BT, position_BT=batch.position_BT)
            predictions = PairPredictions(
                policy,
                hidden_BTH,
                labels_BTK,
                position_BT=batch.position_BT,
                preceding_BT=preceding(batch),
            )
            sums.append(predictions.sums())
    ce_K, correct_K, count_K = (
        torch.stack([getattr(each, name) for each in sums]).sum(dim=0)
        for name in ("ce_sum_K", "correct_K", "count_K")
    )
    policy.train()
    return ce_K / count_K.clamp(min=1), correct_K / count_K.clamp(min=1)
