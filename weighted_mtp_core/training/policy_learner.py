"""Stage 2: weighted multi-token training of the policy.

Shape letters: B rows, T positions, K heads, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import define, field
from torch import Tensor, nn

from weighted_mtp_core.api import Batch, Critic, Weights
from weighted_mtp_core.api.tensors import align_weights
from weighted_mtp_core.checkpointing.best_model import load_model, save_model
from weighted_mtp_core.checkpointing.state import WithPrefix, load_module_state, module_state
from weighted_mtp_core.data.batches import CollatedBatch, preceding
from weighted_mtp_core.metrics.slips import numbers_of_responses, places_of, slip_metrics
from weighted_mtp_core.metrics.weights import share_between_responses, weight_metrics
from weighted_mtp_core.model.chunked_unembedding import add_embedding_rows
from weighted_mtp_core.model.flops import StepFlops
from weighted_mtp_core.model.loss import normalisers, weighted_mtp_loss
from weighted_mtp_core.model.loss_shares import loss_shares
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.recomputed_gates import recompute_gates
from weighted_mtp_core.model.targets import IGNORED, batch_labels, pair_index, sources, target_mask
from weighted_mtp_core.recipe.schema import LossTable
from weighted_mtp_core.recipe.train_table import SelectBy, default_selection
from weighted_mtp_core.runtime.cost import matrix_rate
from weighted_mtp_core.runtime.device import bucket_bytes, evaluation_mode, to_device
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed
from weighted_mtp_core.runtime.gradient_reduction import GradientReduction
from weighted_mtp_core.training.head_quality import MEASURES, head_quality, per_head, selection_score
from weighted_mtp_core.training.loop import Learner, Scalars, StepResult, Validation
from weighted_mtp_core.training.micro_batches import MicroBatch, micro_batches
from weighted_mtp_core.training.objective import Normaliser
from weighted_mtp_core.training.optimisers import Part
from weighted_mtp_core.training.prepare import Prepared
from weighted_mtp_core.training.weight_checks import ValueCheck
from weighted_mtp_core.training.weighting_inputs import Signals, Weighting


@define(kw_only=True, eq=False)
class PolicyLearner(Learner):
    """Trains the policy's parameters that require a gradient; the loss is the weighted multi-token loss.

    Attributes:
        policy: The model to train.
        weighting: Computes the weights.
        loss: The recipe's `[loss]`, which sets, for example, the normalisation and the shares of the heads.
        steps: The number of steps of stage 2; schedules of the heads' shares in the loss depend on it.
        pairs_per_step: Number of counted (position, head) pairs of each head in a step, averaged over an
            epoch; `align_labels` defines which pairs count.
        accumulation: Maximum number of micro-batches per process and step.
        distributed: The processes that train together.
        autocast: Returns a context manager that sets the precision of a forward pass.
        validation: Returns the batches of held-out examples on which the policy is validated.
        best: The file of the best policy.
        log: Receives messages for the user.
        knows_slips: Whether the policy imitates incorrect responses with known mistakes; see
            `Prepared.knows_slips`.
        head_rate: Learning rate of heads 2..K, relative to the learning rate of the stage.
        embedding_rate: Learning rate of embeddings and unembedding, relative to the stage's learning rate.
        select_by: The measure that selects the best policy, see `selection_score`.
        matrix_rate: See `Learner.matrix_rate`.
    """

    policy: Policy
    weighting: Weighting
    loss: LossTable
    steps: int
    pairs_per_step: Sequence[float]
    accumulation: int
    distributed: Distributed = SINGLE_PROCESS
    autocast: Callable[[], torch.autocast]
    validation: Callable[[], Iterable[Batch]]
    best: Path
    log: Callable[[str], None] = print
    knows_slips: bool = False
    head_rate: float = 1.0
    embedding_rate: float = 1.0
    select_by: SelectBy = "head_1"
    matrix_rate: float | None = None
    stage: str = field(default="policy", init=False)
    loss_name: str = field(default="train_loss", init=False)
    _normaliser: Normaliser = field(init=False)
    _signals: Signals = field(init=False)
    _values: ValueCheck = field(init=False)
    _flops: StepFlops | None = field(init=False)

    @classmethod
    def make(
        cls, prepared: Prepared, critic: Critic | None, *, best: Path, distributed: Distributed
    ) -> PolicyLearner:
        """Make the learner of a run from its plan, data and policy."""
        recipe, selected = prepared.plan.recipe, prepared.plan.weighting
        rate = recipe.train.learning_rate
        return cls(
            policy=prepared.policy,
            weighting=Weighting(
                strategy=prepared.build_weighting(),
                needs=selected.needs,
                critic=critic,
                label=f"weighting `{selected.address}` of {selected.plugin}",
                critic_label=prepared.plan.critic_label,
            ),
            loss=recipe.loss,
            steps=prepared.train_table.steps,
            pairs_per_step=prepared.policy_batches().pairs_per_step(prepared.policy.n_future),
            accumulation=recipe.train.accumulation,
            distributed=distributed,
            autocast=prepared.compute.autocast,
            validation=prepared.policy_validation,
            best=best,
            log=prepared.log,
            knows_slips=prepared.knows_slips,
            head_rate=(recipe.train.head_learning_rate or rate) / rate,
            embedding_rate=(recipe.train.embedding_learning_rate or rate) / rate,
            select_by=recipe.train.select_by or default_selection(recipe.model.train, recipe.loss.heads),
            matrix_rate=matrix_rate(prepared.compute),
        )

    def __attrs_post_init__(self) -> None:
        add_embedding_rows(self.policy)
        recompute_gates(self.policy.trunk)
        device = self.policy.unembedding.weight.device
        self._normaliser = Normaliser.make(self.pairs_per_step, self.loss.normalise, device=device)
        self._signals = Signals(
            policy=self.policy,
            weighting=self.weighting,
            autocast=self.autocast,
            distributed=self.distributed,
        )
        self._values = ValueCheck(
            label=self.weighting.label, negative=self.loss.negative_weights, log=self.log
        )
        self._flops = StepFlops.of(
            self.policy, detach_trunk=self.loss.detach_trunk, sparse_trunk=self._signals.sparse_trunk
        )

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the policy's parameters."""
        return self.policy.parameters()

    def parts(self) -> Mapping[nn.Parameter, Part]:
        """Return heads 2..K, and embeddings and unembedding, unless they have the stage's learning rate."""
        found: dict[nn.Parameter, Part] = {}
        if self.embedding_rate != 1.0:
            part = Part(name="embedding", rate=self.embedding_rate)
            found |= dict.fromkeys(self.policy.embedding_parameters(), part)
        if self.head_rate != 1.0:
            found |= dict.fromkeys(self.policy.later_parameters(), Part(name="head", rate=self.head_rate))
        return found

    def embeddings(self) -> Collection[nn.Parameter]:
        """Return the parameters of the embeddings and of the unembedding."""
        return list(self.policy.embedding_parameters())

    def flops(self, batch: Batch) -> float:
        """Return the floating-point operations of a step, see `StepFlops`; 0 if they cannot be counted."""
        if self._flops is None or not isinstance(batch, CollatedBatch):
            return 0.0
        heads, preceding_BT = self.policy.n_future, batch.preceding_BT
        pairs_K = [int((preceding_BT >= k).sum()) for k in range(1, heads + 1)]
        length_D, read = np.concatenate(batch.length_BD), len(sources(preceding_BT, heads))
        return self._flops.of_batch(length_D, pairs_K, sources=read)

    def learn(self, batch: Batch, *, step: int) -> StepResult:
        """Compute the weights of the global batch, then the gradients of its micro-batches.

        For the gradient, the loss of each head is divided by a value for an average step, see `Normaliser`;
        in the result, the loss of each head is divided by the corresponding value for this batch alone.
        Weights can depend on the whole global batch, for example if they are whitened. So if signals are
        computed from the trunk's states, the trunk computes each micro-batch twice: first for the signals of
        all micro-batches, then for the loss. If each process has a single micro-batch and the policy has no
        dropout, the trunk computes the micro-batch only once.
        """
        self.policy.train()
        parts = micro_batches(batch, self.accumulation, self.distributed)
        hidden = [self._signals.trunk(parts[0].batch)] if len(parts) == 1 else [None] * len(parts)
        labels_BTK = batch_labels(batch, self.policy.n_future)
        target_BTK = target_mask(labels_BTK)
        view = self._signals.view(
            batch, target_BTK, parts=parts, hidden=hidden, step=step, steps=self.steps, training=True
        )
        weights = self.weighting.weigh(view)
        weight_BTK = align_weights(weights.weight, target_BTK)
        self._values.note(weights.weight, all_zero=target_BTK.any() & ~weight_BTK.any())
        if self._values.due(step, self.steps):
            self._values.raise_if_bad()
        loss, ce_sum_K, count_K = self._accumulate_gradients(
            parts, hidden, labels_BTK=labels_BTK, weight_BTK=weight_BTK, progress=step / self.steps
        )

        def metrics() -> Scalars:
            return {
                **per_head("train_ce", ce_sum_K / count_K.clamp(min=1)),
                **self._weight_metrics(batch, weight_BTK, target_BTK),
                **weights.metrics,
            }

        return StepResult(loss=loss, metrics=metrics, size=self._normaliser.size(count_K))

    def _weight_metrics(self, batch: Batch, weight_BTK: Tensor, target_BTK: Tensor) -> Scalars:
        pair_N = pair_index(target_BTK, preceding_BT=preceding(batch))
        if not len(pair_N):
            return {}
        weight_N, heads = weight_BTK.flatten()[pair_N], target_BTK.shape[2]
        token_N = pair_N // heads + pair_N % heads + 1  # index of the target in the flattened [B, T]
        response_N = numbers_of_responses(batch.document_BT).flatten()[token_N]
        between = share_between_responses(weight_N, response_N, count=batch.ids_BT.numel())
        found = {**weight_metrics(weight_N), "weight_between_responses": between}
        if self.knows_slips:
            found |= slip_metrics(weight_N, places_of(batch).flatten()[token_N])
        return found

    def _accumulate_gradients(
        self,
        parts: Sequence[MicroBatch],
        hidden: Sequence[Tensor | None],
        *,
        labels_BTK: Tensor,
        weight_BTK: Tensor,
        progress: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add the gradient of the global batch to the parameters.

        Returns:
            The loss of the batch, the sum of the cross-entropies of each head, and the number of pairs of
            each head.
        """
        target_BTK = target_mask(labels_BTK)
        normaliser_K = self._normaliser.add(weight_BTK, target_BTK)
        own_K = normalisers(weight_BTK, target_BTK, normalise=self.loss.normalise)
        share_K = loss_shares(self.loss, self.policy.n_future, progress=progress)
        share_K = to_device(share_K, normaliser_K.device)
        loss_K, ce_sum_K, count_K = torch.zeros(3, *normaliser_K.shape, device=normaliser_K.device)
        with self._reduction() as reduction:
            for part, known_BTH in zip(parts, hidden, strict=True):
                with self.autocast():
                    hidden_BTH = self._signals.trunk(part.batch) if known_BTH is None else known_BTH
                    if part is parts[-1]:
                        reduction.begin_at(hidden_BTH)  # the backward passes of all heads end there
                    result = weighted_mtp_loss(
                        self.policy,
                        hidden_BTH,
                        labels_BTK=part.select(labels_BTK, spare=IGNORED),
                        weight_BTK=part.select(weight_BTK, spare=0),
                        normaliser_K=normaliser_K,
                        head_share_K=share_K,
                        heads=self.loss.heads,
                        detach_trunk=self.loss.detach_trunk,
                        ids_BT=part.batch.ids_BT,
                        position_BT=part.batch.position_BT,
                        preceding_BT=part.preceding_BT,
                    )
                loss_K += result.loss_K
                ce_sum_K += result.ce_sum_K
                count_K += result.count_K
        self.distributed.all_reduce(loss_K, ce_sum_K, count_K)
        return (loss_K * normaliser_K / own_K).sum(), ce_sum_K, count_K

    def _reduction(self) -> GradientReduction:
        return GradientReduction(
            self.parameters(),
            last=self.policy.trunk.parameters(),
            distributed=self.distributed,
            bucket_bytes=bucket_bytes(self.policy.unembedding.weight.device),
        )

    @torch.no_grad()
    def validate(self, *, step: int) -> Validation:
        """Measure each head on held-out examples, and compute the score of the measure `select_by`."""
        del step
        metrics = head_quality(self.policy, self.validation(), split="validation", autocast=self.autocast)
        return Validation(
            metrics=metrics,
            score=selection_score(metrics, self.select_by),
            measure=MEASURES[self.select_by],
        )

    @torch.no_grad()
    def weigh(self, batch: Batch, *, step: int, training: bool = False) -> Weights:
        """Return the weights of a global batch without training on the batch; the policy keeps its mode.

        If `training` is true, the result is as in training step `step`, and the weighting's moving statistics
        change as in training. If `training` is false, the batch is only measured, see `StepView.training`.

        Raises:
            RunFailedError: The weighting or the critic failed, or the weights are invalid.
        """
        parts = micro_batches(batch, self.accumulation, self.distributed)
        target_BTK = target_mask(batch_labels(batch, self.policy.n_future))
        with evaluation_mode(self.policy):
            view = self._signals.view(
                batch,
                target_BTK,
                parts=parts,
                hidden=[None] * len(parts),
                step=step,
                steps=self.steps,
                training=training,
            )
        weights = self.weighting.weigh(view)
        self._values.note(weights.weight)
        self._values.raise_if_bad()
        return weights

    def state_dict(self) -> Mapping[str, Any]:
        """Return the policy's state from `module_state`, the normaliser's sums and the weighting's state.

        Raises:
            RunFailedError: Weights were invalid in a step after the last check, so the state must not be
                saved.
        """
        self._values.raise_if_bad()
        policy = {f"policy.{name}": tensor for name, tensor in module_state(self.policy).items()}
        parts = {
            "normaliser": self._normaliser.state_dict(),
            "weighting": self.weighting.strategy.state_dict(),
        }
        return policy | {f"{part}.{name}": x for part, state in parts.items() for name, x in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        load_module_state(self.policy, WithPrefix(state, "policy"))
        self._normaliser.load_state_dict(WithPrefix(state, "normaliser"))
        self.weighting.strategy.load_state_dict(WithPrefix(state, "weighting"))

    def save_best(self) -> None:
        """Write the policy's weights; `save_model` may leave out frozen weights."""
        save_model(self.policy, self.best, distributed=self.distributed)

    def load_best(self) -> None:
        """Load the policy's weights that `save_best` wrote."""
        load_model(self.policy, self.best)
