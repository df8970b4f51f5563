"""A language model for components of plugins: a copy of the policy's trunk and head 1, or another model.

Shape letters: B rows, T positions, H hidden, V vocabulary, N targets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weighted_mtp_core.api import Batch
from weighted_mtp_core.api.tensors import gather_by_target
from weighted_mtp_core.model.adapters import merged_copy
from weighted_mtp_core.model.pair_predictions import PairPredictions
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import batch_labels, target_mask
from weighted_mtp_core.runtime.fsdp import callable_, copy_of

_BUDGET = 64 << 20  # bytes of logits in a chunk; with several chunks, the backward pass computes logits again


class LanguageModel(nn.Module):
    """Maps a batch to next-token losses, without dropout.

    Args:
        policy: A policy, sharded or not. The policy is not copied, but its heads 2..K are removed.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        policy.heads = type(policy.heads)(policy.heads[:1])
        policy.n_future = 1
        self.policy = callable_(policy.eval())

    @classmethod
    def copy_of(cls, policy: Policy) -> LanguageModel:
        """Return a language model that shares no parameters with the policy."""
        return cls(copy_of(policy))

    def forward(self, batch: Batch) -> Tensor:
        """Return float32 next-token losses `[B, T]` in nats, indexed by the predicted token.

        A loss is 0 unless the predicted token is a response token after another token of its document.
        """
        hidden_BTH = self.policy.trunk_states(batch.ids_BT, position_BT=batch.position_BT)
        if torch.is_grad_enabled():
            return self._losses_with_gradient(hidden_BTH, batch)
        labels_BTK = batch_labels(batch, n_future=1)
        predictions = PairPredictions(self.policy, hidden_BTH, labels_BTK, position_BT=batch.position_BT)
        return gather_by_target(predictions.losses(), target_mask(labels_BTK)).squeeze(-1)

    def _losses_with_gradient(self, hidden_BTH: Tensor, batch: Batch) -> Tensor:
        states_BTH = self.policy.head_states(
            1, hidden_BTH, ids_BT=batch.ids_BT, position_BT=batch.position_BT
        )
        row_N, column_N = batch.target_positions()
        label_N, state_NH = batch.ids_BT[row_N, column_N], states_BTH[row_N, column_N - 1]
        size = max(_BUDGET // (4 * self.policy.vocab_size), 1)
        chunks = list(zip(torch.split(state_NH, size), torch.split(label_N, size), strict=True))
        unembedding = self.policy.unembedding
        # The matrix is gathered once for all chunks, because gathering is a collective operation, and the
        # number of chunks differs between processes.
        matrix_VH = unembedding.matrix(unembedding.dtype)
        losses = [
            self._chunk(matrix_VH, *chunk)
            if len(chunks) == 1
            else checkpoint(self._chunk, matrix_VH, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
        zero_BT = torch.zeros(batch.ids_BT.shape, device=hidden_BTH.device)
        return zero_BT.index_put((row_N, column_N), torch.cat(losses))

    def _chunk(self, matrix_VH: Tensor, state_NH: Tensor, label_N: Tensor) -> Tensor:
        logits_NV = self.policy.unembedding.logits(state_NH, matrix_VH).float()
        return nn.functional.cross_entropy(logits_NV, label_N, reduction="none")


def frozen_losses(model: LanguageModel) -> Callable[[Batch], Tensor]:
    """Freeze a language model; return a function that computes its losses (`forward`) without gradient."""
    return torch.no_grad()(model.requires_grad_(requires_grad=False).forward)


def trainable_losses(policy: Policy) -> LanguageModel:
    """Return a copy of the policy's language model with all parameters trainable.

    If the policy has adapters, the adapters are merged in the copy.

    Raises:
        WmtpError: The policy is sharded and has adapters.
    """
    return LanguageModel(merged_copy(policy)).requires_grad_(requires_grad=True)
