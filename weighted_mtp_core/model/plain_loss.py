"""The weighted multi-token loss as its formula reads: all logits at once, gradients by autograd.

Tests and benchmarks compare `weighted_mtp_loss` with it.

Shape letters: B rows, T positions, K heads, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import IGNORED


def plain_mtp_loss(
    policy: Policy,
    hidden_BTH: Tensor,
    *,
    labels_BTK: Tensor,
    weight_BTK: Tensor | None,
    normaliser_K: Tensor,
    head_share_K: Tensor,
    detach_trunk: bool = False,
    position_BT: Tensor | None = None,
) -> Tensor:
    """Return the loss, a float32 scalar with its graph; arguments are those of `weighted_mtp_loss`."""
    logits_BTKV = torch.stack(
        [
            policy.unembedding(
                policy.head_states(
                    k + 1, hidden_BTH.detach() if detach_trunk and k else hidden_BTH, position_BT=position_BT
                )
            )
            for k in range(policy.n_future)
        ],
        dim=2,
    ).float()
    ce_BTK = nn.functional.cross_entropy(
        logits_BTKV.movedim(-1, 1), labels_BTK, ignore_index=IGNORED, reduction="none"
    )
    weighted_BTK = ce_BTK if weight_BTK is None else weight_BTK * ce_BTK
    return (head_share_K / normaliser_K * weighted_BTK.sum(dim=(0, 1))).sum()
