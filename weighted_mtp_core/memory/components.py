"""Builds the critic of a recipe on tensors without values, and a stand-in for its weighting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

from weighted_mtp_core.api import (
    Batch,
    BuildContext,
    Critic,
    ModelContext,
    StepView,
    WeightingStrategy,
    Weights,
)
from weighted_mtp_core.memory.empty_policy import config_of, empty_policy
from weighted_mtp_core.model.language_model import LanguageModel, frozen_losses, trainable_losses
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.pretrained import empty_model
from weighted_mtp_core.model.trunk import Trunk, frozen_trunk
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.recipe.schema import ModelTable


class UniformWeights(WeightingStrategy):
    """Stands in for every weighting, because weights take a negligible part of the memory."""

    def weigh(self, view: StepView) -> Weights:
        """Return 1 for each response token."""
        return Weights(weight=view.response_BT.float())


def build_critic(plan: Plan, policy: Policy) -> Critic | None:
    """Build the critic of a plan; None if the plan has no critic.

    The models that the critic uses are made from their configs or copied from the policy; no weights are
    read.
    """
    if plan.critic is None:
        return None
    run, storage = plan.recipe.run, Path(plan.recipe.run.storage)

    def trainable_trunk(base: str | None) -> nn.Module:
        from transformers import AutoModel

        if base is None:
            return Trunk(copy.deepcopy(policy.trunk))
        table = attrs.evolve(plan.recipe.model, base=base)
        return Trunk(empty_model(config_of(table, storage=storage), AutoModel))

    def another_model(path: Path | None) -> Callable[[Batch], Tensor]:
        if path is None or not (path / "config.json").is_file():
            return frozen_losses(LanguageModel.copy_of(policy))
        table = ModelTable(base=str(path), n_future=1)
        return frozen_losses(LanguageModel(empty_policy(config_of(table, storage=storage), table)))

    model = ModelContext(
        n_future=policy.n_future,
        hidden_size=policy.hidden_size,
        vocab_size=policy.vocab_size,
        device=torch.device("cpu"),
        frozen_trunk=partial(frozen_trunk, policy),
        frozen_losses=another_model,
        trainable_losses=partial(trainable_losses, policy),
        trainable_trunk=trainable_trunk,
        eos_id=0,
    )
    built: Critic = plan.critic.build(BuildContext(seed=run.seed, storage=storage, model=model))
    return built
