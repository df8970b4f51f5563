"""What the policy's heads know of each pair: the signals `TOKEN_LOSS` and `TOKEN_ENTROPY`, and sums per head.

All of it is unweighted, float32 and without gradient. Arguments are those of `loss.weighted_mtp_loss`.

Shape letters: B rows, T positions, K heads, N counted pairs of one head, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from attrs import frozen
from torch import Tensor

from weighted_mtp_core.model.chunked_unembedding import ChunkedUnembedding
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import Counts, source_index, take, target_mask

Measured = TypeVar("Measured")


@frozen(kw_only=True, eq=False)
class HeadSums:
    """Float32 sums over the counted pairs of each head.

    Attributes:
        ce_sum_K: Sum of the unweighted cross-entropies, in nats.
        correct_K: Number of pairs whose target is the likeliest token.
        count_K: Number of pairs.
    """

    ce_sum_K: Tensor
    correct_K: Tensor
    count_K: Tensor


@torch.no_grad()
def head_sums(
    policy: Policy,
    hidden_BTH: Tensor,
    labels_BTK: Tensor,
    *,
    position_BT: Tensor | None = None,
    preceding_BT: Counts | None = None,
) -> HeadSums:
    """Return each head's summed loss and correct predictions."""
    measured = _measured(
        ChunkedUnembedding.sums,
        policy,
        hidden_BTH,
        labels_BTK,
        position_BT=position_BT,
        preceding_BT=preceding_BT,
    )
    ce_sums, correct = zip(*(sums for _, sums in measured), strict=True)
    return HeadSums(
        ce_sum_K=torch.stack(ce_sums),
        correct_K=torch.stack(correct),
        count_K=target_mask(labels_BTK).sum(dim=(0, 1), dtype=torch.float32),
    )


def token_losses(
    policy: Policy,
    hidden_BTH: Tensor,
    labels_BTK: Tensor,
    *,
    position_BT: Tensor | None = None,
    preceding_BT: Counts | None = None,
) -> Tensor:
    """Return each pair's cross-entropy in nats, float32 `[B, T, K]`, 0 where the pair does not count."""
    measured = _measured(
        ChunkedUnembedding.losses,
        policy,
        hidden_BTH,
        labels_BTK,
        position_BT=position_BT,
        preceding_BT=preceding_BT,
    )
    return _by_pair(measured, labels_BTK)


def token_entropies(
    policy: Policy,
    hidden_BTH: Tensor,
    labels_BTK: Tensor,
    *,
    position_BT: Tensor | None = None,
    preceding_BT: Counts | None = None,
) -> Tensor:
    """Return the entropy of each prediction in nats, float32 `[B, T, K]`, 0 where the pair does not count."""
    measured = _measured(
        ChunkedUnembedding.entropies,
        policy,
        hidden_BTH,
        labels_BTK,
        position_BT=position_BT,
        preceding_BT=preceding_BT,
    )
    return _by_pair(measured, labels_BTK)


def _measured(
    measure: Callable[[ChunkedUnembedding, Tensor, Tensor, Tensor], Measured],
    policy: Policy,
    hidden_BTH: Tensor,
    labels_BTK: Tensor,
    *,
    position_BT: Tensor | None,
    preceding_BT: Counts | None,
) -> Iterator[tuple[Tensor, Measured]]:
    """Yield each head's index of counted pairs, and what `measure` returns for them."""
    unembedding = ChunkedUnembedding.of(policy, hidden_BTH)
    for k in range(1, policy.n_future + 1):
        label_BT = labels_BTK[:, :, k - 1]
        index_N = source_index(label_BT, k=k, preceding_BT=preceding_BT)
        with policy.sparse_rows(k, index_N):
            state_BTH = policy.head_states(k, hidden_BTH, position_BT=position_BT)
        yield index_N, measure(unembedding, state_BTH, index_N, take(label_BT, index_N))


@torch.no_grad()
def _by_pair(measured: Iterator[tuple[Tensor, Tensor]], labels_BTK: Tensor) -> Tensor:
    """Return the measured values as float32 `[B, T, K]`, 0 elsewhere."""
    value_BTK = torch.zeros(labels_BTK.shape, dtype=torch.float32, device=labels_BTK.device)
    for head, (index_N, value_N) in enumerate(measured):
        value_BTK.flatten(0, 1)[:, head].index_copy_(0, index_N, value_N)
    return value_BTK
