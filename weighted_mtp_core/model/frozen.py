"""The policy's ordinary language model, frozen: a reference that does not learn any more.

Shape letters: B rows, T positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from weighted_mtp_core.api import Batch
from weighted_mtp_core.api.alignment import gather_by_target
from weighted_mtp_core.model.loss import token_losses
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import align_labels, target_mask


def frozen_losses(
    policy: Policy, checkpoint: Path | None, *, load: Callable[[Policy, Path], None]
) -> Callable[[Batch], Tensor]:
    """Return the next-token losses of a copy of the policy that never changes.

    Args:
        policy: What is copied.
        checkpoint: Weights for the copy; None keeps those that the policy has now.
        load: Reads them into the copy.

    Returns:
        A function from a batch to float32 `[B, T]`: the loss of each response token that has a token of its
        document before it, 0 elsewhere.
    """
    twin = copy.deepcopy(policy)
    if checkpoint is not None:
        load(twin, checkpoint)
    twin.heads = twin.heads[:1]
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
