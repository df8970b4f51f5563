"""The weighting of a run, and its input: the global batch with the signals that the weighting declares.

Shape letters: B rows, T positions, K heads, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import attrs
import torch
from attrs import field, frozen
from torch import Tensor

from weighted_mtp_core.api import Batch, Critic, Scores, Signal, StepView, WeightingStrategy, Weights
from weighted_mtp_core.api.tensors import CRITIC_SIGNALS
from weighted_mtp_core.data.batches import CollatedBatch, preceding
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.messages import reason
from weighted_mtp_core.model.pair_predictions import PairPredictions
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import batch_labels, sources
from weighted_mtp_core.runtime.device import evaluation_mode, to_device
from weighted_mtp_core.runtime.distributed import Distributed
from weighted_mtp_core.training.critic_scores import critic_scores
from weighted_mtp_core.training.micro_batches import MicroBatch, gather_rows
from weighted_mtp_core.training.plugin_metrics import check_metrics
from weighted_mtp_core.training.weight_checks import check_weights

# Signals that the heads compute in a separate forward pass before the pass with the weighted loss.
_FROM_HEADS = {Signal.TOKEN_LOSS: PairPredictions.losses, Signal.TOKEN_ENTROPY: PairPredictions.entropies}

# The signals by field of `StepView`; the name of a field is the name of its signal, followed by the shape.
_SIGNALS = {
    each.name: Signal(name)
    for each in attrs.fields(StepView)
    if (name := each.name.rpartition("_")[0]) in {signal.value for signal in Signal}
}


@frozen(kw_only=True, eq=False)
class Weighting:
    """A weighting strategy with the signals that it declares, and the critic that computes some of them.

    Attributes:
        strategy: The strategy, which is called once per step with the whole global batch.
        needs: The signals that the strategy declares.
        critic: Computes the signals in `CRITIC_SIGNALS`; None if there is no critic.
        label: The weighting's address, plugin, distribution and version, for messages.
        critic_label: The critic's address, plugin, distribution and version; empty without a critic.
    """

    strategy: WeightingStrategy
    needs: frozenset[Signal]
    critic: Critic | None
    label: str
    critic_label: str = ""

    def weigh(self, view: StepView) -> Weights:
        """Return the strategy's weights after checking their type, shape and dtype, but not their values.

        Raises:
            RunFailedError: The strategy failed or returned invalid weights or metrics; the message names the
                plugin.
        """
        try:
            weights = self.strategy.weigh(view)
        except WmtpError as error:
            raise RunFailedError(f"{self.label} failed: {error}", hint=error.hint) from error
        except Exception as error:
            hint = _undeclared(view)
            raise RunFailedError(f"{self.label} failed: {reason(error)}", hint=hint) from error
        check_weights(weights, view.response_BT, n_future=view.n_future, label=self.label)
        check_metrics(weights.metrics, label=self.label)
        return weights


@frozen(kw_only=True, eq=False)
class _View(StepView):
    """A view that records which signals are read although the view does not contain them."""

    missing: dict[str, None] = field(factory=dict)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if value is None and name in _SIGNALS:
            self.missing[name] = None
        return value


def _undeclared(view: StepView) -> str | None:
    """Return a hint on which signals to declare; None if no signal is known to have been missing."""
    if not isinstance(view, _View) or not view.missing:
        return None
    names = ", ".join(f"`view.{name}`" for name in view.missing)
    declare = ", ".join(f"`Signal.{_SIGNALS[name].name}`" for name in view.missing)
    return f"{names} is None unless the component declares the signal: add {declare} to its `needs`"


def _names(batch: Batch) -> tuple[tuple[str, ...], ...]:
    return batch.names if isinstance(batch, CollatedBatch) else tuple((each,) for each in batch.example_ids)


def _log_value(scores: Scores) -> Tensor | None:
    if scores.log_value_BT is None and scores.value_BT is not None:
        return scores.value_BT.log()
    return scores.log_value_BT


def _given(batch: Batch) -> Tensor:
    """Return the weights that come with the data; 1 on responses if there are none."""
    return batch.response_BT.to(torch.float32) if batch.given_BT is None else batch.given_BT


@frozen(kw_only=True, eq=False)
class Signals:
    """Computes the signals of a weighting.

    Attributes:
        policy: The policy, whose trunk states and heads are used.
        weighting: The weighting, with the signals that it declares and its critic.
        autocast: Returns a context manager that sets the precision of a forward pass.
        distributed: The processes; each process computes the signals of its own micro-batches.
    """

    policy: Policy
    weighting: Weighting
    autocast: Callable[[], torch.autocast]
    distributed: Distributed

    @property
    def sparse_trunk(self) -> bool:
        """Whether `trunk` skips positions: only the sources of counted pairs are read, see `Policy`."""
        critic = self.weighting.critic
        return self.policy.sparse_trunk and not (critic is not None and critic.reads_policy)

    def trunk(self, batch: Batch) -> Tensor:
        """Return the trunk states `[B, T, H]` of a batch; if `sparse_trunk` is true, others may be wrong."""
        rows, preceding_BT = None, preceding(batch)
        if self.sparse_trunk and preceding_BT is not None:
            rows = to_device(sources(preceding_BT, self.policy.n_future), batch.ids_BT.device)
        with self.autocast():
            return self.policy.trunk_states(batch.ids_BT, position_BT=batch.position_BT, rows=rows)

    @torch.no_grad()
    def view(
        self,
        batch: Batch,
        target_BTK: Tensor,
        *,
        parts: Sequence[MicroBatch],
        hidden: Sequence[Tensor | None],
        step: int,
        steps: int,
        training: bool,
    ) -> StepView:
        """Return the view of the global batch; its signals are computed without dropout.

        Args:
            batch: The global batch.
            target_BTK: bool, True for the pairs that count.
            parts: This process's micro-batches.
            hidden: Trunk states of the micro-batches; None for states that have not been computed yet.
            step: Number of completed optimiser steps.
            steps: Optimiser steps of the stage.
            training: True for a training step, False for a batch that is only measured.
        """
        needs, rows, distributed = self.weighting.needs, len(batch.ids_BT), self.distributed
        dropout = self.policy.has_dropout
        if dropout:  # signals must not depend on dropout
            hidden = [None] * len(parts)
        with evaluation_mode(self.policy) if dropout else nullcontext():
            found = [self._compute(part.batch, known) for part, known in zip(parts, hidden, strict=True)]
        signals = {
            name: gather_rows(parts, [each[name] for each in found], rows=rows, distributed=distributed)
            for name in found[0]
        }
        return _View(
            ids_BT=batch.ids_BT,
            document_BT=batch.document_BT,
            response_BT=batch.response_BT,
            target_BTK=target_BTK,
            n_future=self.policy.n_future,
            step=step,
            training=training,
            steps=steps,
            example_ids=_names(batch),
            metadata=batch.metadata if isinstance(batch, CollatedBatch) else (),
            reward_BT=batch.reward_BT if Signal.REWARD in needs else None,
            group_BT=batch.group_BT if Signal.GROUP in needs else None,
            given_BT=_given(batch) if Signal.GIVEN in needs else None,
            value_BT=signals.get(Signal.VALUE),
            log_value_BT=signals.get(Signal.LOG_VALUE),
            token_loss_BTK=signals.get(Signal.TOKEN_LOSS),
            token_entropy_BTK=signals.get(Signal.TOKEN_ENTROPY),
            reference_loss_BT=signals.get(Signal.REFERENCE_LOSS),
        )

    def _compute(self, batch: Batch, hidden_BTH: Tensor | None) -> dict[Signal, Tensor]:
        """Return the needed signals that critic and heads compute, in the same order in every process."""
        needs = self.weighting.needs
        from_heads = {signal: read for signal, read in _FROM_HEADS.items() if signal in needs}
        critic = self.weighting.critic if needs & {*CRITIC_SIGNALS} else None
        reads_trunk = critic is not None and critic.reads_policy
        if hidden_BTH is None and (reads_trunk or from_heads):
            hidden_BTH = self.trunk(batch)
        found: dict[Signal, Tensor | None] = {}
        if critic is not None:
            states = hidden_BTH if reads_trunk else None
            label = self.weighting.critic_label
            scores = critic_scores(critic, batch, states, autocast=self.autocast, label=label)
            found = {
                Signal.VALUE: scores.value_BT,
                Signal.LOG_VALUE: _log_value(scores),
                Signal.REFERENCE_LOSS: scores.reference_loss_BT,
            }
        if from_heads and hidden_BTH is not None:
            predictions = PairPredictions(
                self.policy,
                hidden_BTH.detach(),
                batch_labels(batch, self.policy.n_future),
                ids_BT=batch.ids_BT,
                position_BT=batch.position_BT,
                preceding_BT=preceding(batch),
            )
            with self.autocast():
                found |= {signal: read(predictions) for signal, read in from_heads.items()}
        return {signal: value for signal, value in found.items() if value is not None and signal in needs}
