"""Cross-entropy and accuracy of each head, as validation and stage 3 report them.

Shape letters: B rows, T positions, K heads, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from weighted_mtp_core.api import Batch
from weighted_mtp_core.data.batches import preceding
from weighted_mtp_core.model.pair_predictions import HeadSums, PairPredictions
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import align_labels


@torch.no_grad()
def head_quality(
    policy: Policy, batches: Iterable[Batch], *, autocast: Callable[[], torch.autocast]
) -> tuple[Tensor, Tensor]:
    """Return unweighted cross-entropy and top-1 accuracy of each head over all targets of the batches.

    Returns:
        `ce_K` (nats per target) and `accuracy_K`, float32; 0 for a head without targets.
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


def per_head(name: str, value_K: Tensor) -> dict[str, Tensor]:
    """Return values of the heads as metrics `<name>_head_<k>`, k from 1."""
    return {f"{name}_head_{k}": value for k, value in enumerate(value_K.unbind(), start=1)}
