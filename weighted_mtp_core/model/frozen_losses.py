"""Next-token losses of a frozen copy of the policy, which serves as a reference model.

Shape letters: B rows, T positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from weighted_mtp_core.api import Batch
from weighted_mtp_core.api.tensors import gather_by_target
from weighted_mtp_core.model.pair_predictions import PairPredictions
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import batch_labels, target_mask


def frozen_losses(
    policy: Policy, checkpoint: Path | None, *, load: Callable[[Policy, Path], None]
) -> Callable[[Batch], Tensor]:
    """Copy the policy and return a function that computes the copy's next-token losses.

    Args:
        policy: The policy to copy.
        checkpoint: File with the weights of the copy; None keeps the policy's current weights.
        load: Loads a checkpoint into a policy.

    Returns:
        A function that maps a batch to float32 losses `[B, T]` in nats of the response tokens that follow
        another token of their document; 0 for all other tokens.
    """
    twin = copy.deepcopy(policy)
    if checkpoint is not None:
        load(twin, checkpoint)
    twin.heads = type(twin.heads)(twin.heads[:1])
    twin.n_future = 1
    twin.eval().requires_grad_(requires_grad=False)

    @torch.no_grad()
    def losses(batch: Batch) -> Tensor:
        labels_BTK = batch_labels(batch, n_future=1)
        hidden_BTH = twin.trunk_states(batch.ids_BT, position_BT=batch.position_BT)
        predictions = PairPredictions(twin, hidden_BTH, labels_BTK, position_BT=batch.position_BT)
        return gather_by_target(predictions.losses(), target_mask(labels_BTK)).squeeze(-1)

    return losses
