"""Measures the heads' predictions: the loss and the entropy of each (position, head) pair, and sums by head.

Shape letters: B rows, T positions, K heads, N counted pairs of one head, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from attrs import field, frozen
from torch import Tensor

from weighted_mtp_core.model.chunked_unembedding import ChunkedUnembedding
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import (
    IGNORED,
    Counts,
    choices_of_head_1,
    source_index,
    take,
    target_mask,
)

Measured = TypeVar("Measured")


@frozen(kw_only=True, eq=False)
class HeadSums:
    """Float32 sums over the counted pairs of each head, and over the passes of self-speculative decoding.

    The choice of a head is the token that the head predicts as the likeliest. Head 1 confirms head k's choice
    for a pair (t, k) if head 1 makes the same choice for the pair (t + k - 1, 1), which has the same target.
    A pass drafts at each position t for which the pairs (t, 1) and, if K > 1, (t, 2) count: head 1 predicts
    token t + 1, and heads 2, 3, ... draft the tokens that follow token t + 1.

    Attributes:
        ce_sum_K: Sum of the unweighted cross-entropies, in nats.
        correct_K: Number of counted pairs for which the target is the head's choice.
        confirmed_K: Number of counted pairs for which head 1 confirms the head's choice.
        count_K: Number of counted pairs.
        passes: Number of positions at which a pass drafts, a scalar.
        accepted: Number of accepted drafts of all passes, a scalar. A pass accepts the choices of heads 2, 3,
            ... before the first choice whose pair does not count or that head 1 does not confirm.
    """

    ce_sum_K: Tensor
    correct_K: Tensor
    confirmed_K: Tensor
    count_K: Tensor
    passes: Tensor
    accepted: Tensor


@frozen(eq=False)
class PairPredictions:
    """The heads' predictions for trunk states, without weights or gradients.

    Attributes:
        policy: The policy, whose heads and unembedding are used.
        hidden_BTH: Trunk states.
        labels_BTK: The result of `align_labels`.
        ids_BT: Token ids, `Batch.ids_BT`; only `sequential` heads read them.
        position_BT: Positions, `Batch.position_BT`.
        preceding_BT: `CollatedBatch.preceding_BT`; if None, finding the pairs of each head synchronises with
            the device.
    """

    policy: Policy
    hidden_BTH: Tensor
    labels_BTK: Tensor
    ids_BT: Tensor | None = field(default=None, kw_only=True)
    position_BT: Tensor | None = field(default=None, kw_only=True)
    preceding_BT: Counts | None = field(default=None, kw_only=True)

    def losses(self) -> Tensor:
        """Return each pair's cross-entropy in nats, float32 `[B, T, K]`, 0 for pairs that do not count."""
        return self._by_pair(ChunkedUnembedding.losses)

    def entropies(self) -> Tensor:
        """Return each prediction's entropy in nats, float32 `[B, T, K]`, 0 for pairs that do not count."""
        return self._by_pair(ChunkedUnembedding.entropies)

    @torch.no_grad()
    def sums(self) -> HeadSums:
        """Return the sums that `HeadSums` describes."""
        choice_BTK, ce_sums = torch.full_like(self.labels_BTK, IGNORED), []
        for head, (index_N, (ce, choice_N)) in enumerate(self._measure(ChunkedUnembedding.choices)):
            choice_BTK.flatten(0, 1)[:, head].index_copy_(0, index_N, choice_N)
            ce_sums.append(ce)
        target_BTK = target_mask(self.labels_BTK)
        confirmed_BTK = target_BTK & (choice_BTK == choices_of_head_1(choice_BTK))
        drafts_BT = target_BTK[..., :2].all(dim=-1)
        accepted_BT = confirmed_BTK[..., 1:].cumprod(dim=-1).sum(dim=-1).where(drafts_BT, 0)
        return HeadSums(
            ce_sum_K=torch.stack(ce_sums),
            correct_K=_count(target_BTK & (choice_BTK == self.labels_BTK)),
            confirmed_K=_count(confirmed_BTK),
            count_K=_count(target_BTK),
            passes=drafts_BT.sum(dtype=torch.float32),
            accepted=accepted_BT.sum(dtype=torch.float32),
        )

    @torch.no_grad()
    def _by_pair(self, measure: Callable[[ChunkedUnembedding, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        value_BTK = torch.zeros(self.labels_BTK.shape, dtype=torch.float32, device=self.labels_BTK.device)
        for head, (index_N, value_N) in enumerate(self._measure(measure)):
            value_BTK.flatten(0, 1)[:, head].index_copy_(0, index_N, value_N)
        return value_BTK

    def _measure(
        self, measure: Callable[[ChunkedUnembedding, Tensor, Tensor, Tensor], Measured]
    ) -> Iterator[tuple[Tensor, Measured]]:
        """Yield, for each head, the sources of its counted pairs and what `measure` returns for the pairs."""
        unembedding = ChunkedUnembedding.of(self.policy, self.hidden_BTH)
        labels = self.labels_BTK.unbind(dim=-1)
        rows = [
            source_index(each, k=k, preceding_BT=self.preceding_BT) for k, each in enumerate(labels, start=1)
        ]
        states = self.policy.each_head_states(
            self.hidden_BTH, ids_BT=self.ids_BT, position_BT=self.position_BT, rows=rows
        )
        for state_BTH, label_BT, index_N in zip(states, labels, rows, strict=True):
            yield index_N, measure(unembedding, state_BTH, index_N, take(label_BT, index_N))


def _count(true_BTK: Tensor) -> Tensor:
    return true_BTK.sum(dim=(0, 1), dtype=torch.float32)
