"""Copies of the policy that never change: its trunk, and its ordinary language model as a reference.

Shape letters: B rows, T positions, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from weighted_mtp_core.api import Batch
from weighted_mtp_core.api.alignment import gather_by_target
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import align_labels, target_mask
from weighted_mtp_core.model.token_signals import token_losses


def frozen_trunk(policy: Policy) -> Callable[[Batch], Tensor]:
    """Copy the trunk; return a function from a batch to its float32 states `[B, T, H]`, without gradients."""
    trunk = copy.deepcopy(policy.trunk).eval().requires_grad_(requires_grad=False)

    @torch.no_grad()
    def states(batch: Batch) -> Tensor:
        hidden: Tensor = trunk(
            input_ids=batch.ids_BT, position_ids=batch.position_BT, use_cache=False
        ).last_hidden_state
        return hidden.float()

    return states


def frozen_losses(
    policy: Policy, checkpoint: Path | None, *, load: Callable[[Policy, Path], None]
) -> Callable[[Batch], Tensor]:
    """Copy the policy and return its next-token losses.

    Args:
        policy: The policy to copy.
        checkpoint: Weights for the copy; None keeps the policy's present ones.
        load: Reads a checkpoint into a policy.

    Returns:
        A function from a batch to float32 `[B, T]`: the loss of each response token that follows a token of
        its document, 0 elsewhere.
    """
    twin = copy.deepcopy(policy)
    if checkpoint is not None:
        load(twin, checkpoint)
    twin.heads = type(twin.heads)(twin.heads[:1])
    twin.n_future = 1
    twin.eval().requires_grad_(requires_grad=False)

    @torch.no_grad()
    def losses(batch: Batch) -> Tensor:
        labels_BTK = align_labels(
            batch.ids_BT, document_BT=batch.document_BT, response_BT=batch.response_BT, n_future=1
        )
        hidden_BTH = twin.trunk_states(batch.ids_BT, position_BT=batch.position_BT)
        loss_BTK = token_losses(twin, hidden_BTH, labels_BTK, position_BT=batch.position_BT)
        return gather_by_target(loss_BTK, target_mask(labels_BTK)).squeeze(-1)

    return losses
