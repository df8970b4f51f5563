"""The weighted multi-token loss, without ever holding the `[B, T, K, V]` logits.

`L = sum_k alpha_k * sum_t w[t, k] * CE(head_k(h_t), x[t + k]) / Z_k`, after Gloeckle et al. 2024 (eq. 2) with
weights. Two things make it cheap: rows that predict nothing are left out before the unembedding, and the
gradient of a chunk's logits is formed while they are there, in the forward pass, so that nothing is
kept or computed twice.

Shape letters: B rows, T positions, K heads, N counted pairs of one head, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from attrs import frozen
from torch import Tensor, nn

from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import target_mask

CHUNK = 256
"""Pairs whose logits exist at one time: 256 x 49152 in fp32 are 48 MiB."""


@frozen(kw_only=True, eq=False)
class MtpLoss:
    """The loss of a batch and its sums by head, all fp32; only `loss` carries a gradient.

    Attributes:
        loss: Scalar.
        ce_sum_K: Sum of the unweighted cross-entropies, in nats.
        count_K: How many pairs counted.
        weight_sum_K: Sum of the weights.
        correct_K: How many targets were the most likely token.
    """

    loss: Tensor
    ce_sum_K: Tensor
    count_K: Tensor
    weight_sum_K: Tensor
    correct_K: Tensor


def head_shares(head_weights: Sequence[float], n_future: int) -> Tensor:
    """Return `alpha_K`, float32, summing to 1; no weights mean equal shares."""
    weights = torch.tensor(head_weights or (1.0,) * n_future, dtype=torch.float32)
    return weights / weights.sum()


def normalisers(weight_BTK: Tensor, target_BTK: Tensor, *, normalise: Literal["weights", "tokens"]) -> Tensor:
    """Return `Z_K`, float32: the sum of the weights, or the number of pairs, of the global batch.

    A head with Z = 0 gets 1, so that its loss and gradient are 0.
    """
    counted = weight_BTK if normalise == "weights" else target_BTK
    total_K = counted.sum(dim=(0, 1), dtype=torch.float32)
    return torch.where(total_K > 0, total_K, 1.0)


def weighted_mtp_loss(
    policy: Policy,
    hidden_BTH: Tensor,
    *,
    labels_BTK: Tensor,
    weight_BTK: Tensor | None,
    normaliser_K: Tensor,
    head_share_K: Tensor,
    position_BT: Tensor | None = None,
) -> MtpLoss:
    """Return the loss of trunk states; heads run one after the other.

    Args:
        policy: Heads and unembedding.
        hidden_BTH: Trunk states, with gradient.
        labels_BTK: From `align_labels`.
        weight_BTK: float32, 0 where nothing counts; None means 1 everywhere.
        normaliser_K: Z by head, of the *global* batch: parts of an accumulated batch add up exactly.
        head_share_K: alpha by head.
        position_BT: From `Batch.position_BT`.
    """
    target_BTK = target_mask(labels_BTK)
    scale_K = head_share_K / normaliser_K
    losses, ce_sums, correct, weight_sums = [], [], [], []
    for k in range(1, policy.n_future + 1):
        counts_BT = target_BTK[:, :, k - 1]
        state_NH = policy.head_states(k, hidden_BTH, position_BT=position_BT)[counts_BT]
        label_N = labels_BTK[:, :, k - 1][counts_BT]
        weight_N = (
            torch.ones_like(label_N, dtype=torch.float32)
            if weight_BTK is None
            else weight_BTK[:, :, k - 1][counts_BT].float()
        )
        loss, ce_N, correct_N = _FusedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            state_NH, policy.unembedding.weight, label_N, weight_N * scale_K[k - 1]
        )
        losses.append(loss)
        ce_sums.append(ce_N.sum())
        correct.append(correct_N.sum(dtype=torch.float32))
        weight_sums.append(weight_N.sum())
    return MtpLoss(
        loss=torch.stack(losses).sum(),
        ce_sum_K=torch.stack(ce_sums),
        count_K=target_BTK.sum(dim=(0, 1), dtype=torch.float32),
        weight_sum_K=torch.stack(weight_sums),
        correct_K=torch.stack(correct),
    )


@torch.no_grad()
def token_losses(
    policy: Policy, hidden_BTH: Tensor, labels_BTK: Tensor, *, position_BT: Tensor | None = None
) -> Tensor:
    """Return each pair's unweighted cross-entropy, float32 `[B, T, K]`, 0 where nothing counts."""
    loss_BTK = torch.zeros(labels_BTK.shape, dtype=torch.float32, device=labels_BTK.device)
    for k in range(1, policy.n_future + 1):
        counts_BT = target_mask(labels_BTK[:, :, k - 1])
        state_NH = policy.head_states(k, hidden_BTH, position_BT=position_BT)[counts_BT]
        label_N = labels_BTK[:, :, k - 1][counts_BT]
        chunks = zip(torch.split(state_NH, CHUNK), torch.split(label_N, CHUNK), strict=True)
        parts = [_cross_entropies(state, policy.unembedding, label) for state, label in chunks]
        loss_BTK[:, :, k - 1][counts_BT] = torch.cat(parts)
    return loss_BTK


def _cross_entropies(state_NH: Tensor, unembedding: nn.Linear, label_N: Tensor) -> Tensor:
    return nn.functional.cross_entropy(unembedding(state_NH).float(), label_N, reduction="none")


class _FusedCrossEntropy(torch.autograd.Function):
    """`sum_n c_n * CE(state_n W^T, label_n)` by chunks of rows, its gradients formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, state_NH: Tensor, weight_VH: Tensor, label_N: Tensor, scale_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scalar loss, and without gradient each row's cross-entropy and correctness."""
        wants_state, wants_weight = ctx.needs_input_grad[:2]
        state_gradient = torch.empty_like(state_NH) if wants_state else None
        weight_gradient = torch.zeros_like(weight_VH) if wants_weight else None
        ce_N = torch.empty(len(label_N), dtype=torch.float32, device=label_N.device)
        correct_N = torch.empty(len(label_N), dtype=torch.bool, device=label_N.device)
        dtype = _compute_dtype(state_NH)
        with torch.autocast(state_NH.device.type, enabled=False):
            matrix = weight_VH.to(dtype)
            for first in range(0, len(label_N), CHUNK):
                rows = slice(first, first + CHUNK)
                state, label = state_NH[rows].to(dtype), label_N[rows, None]
                logits = nn.functional.linear(state, matrix).float()
                correct_N[rows] = logits.argmax(dim=-1) == label[:, 0]
                log_total = logits.logsumexp(dim=-1, keepdim=True)
                ce_N[rows] = (log_total - logits.gather(1, label))[:, 0]
                if not (wants_state or wants_weight):
                    continue
                gradient = logits.sub_(log_total).exp_()
                gradient.scatter_add_(1, label, -torch.ones_like(label, dtype=gradient.dtype))
                gradient = gradient.mul_(scale_N[rows, None]).to(dtype)
                if state_gradient is not None:
                    state_gradient[rows] = gradient @ matrix
                if weight_gradient is not None:
                    weight_gradient += gradient.T @ state
        ctx.gradients = (state_gradient, weight_gradient)
        ctx.mark_non_differentiable(ce_N, correct_N)
        return (ce_N * scale_N).sum(), ce_N, correct_N

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Scale what the forward pass formed, and let go of it (autograd would clone it otherwise)."""
        upstream = outputs[0]
        gradients, ctx.gradients = ctx.gradients, None
        state_gradient, weight_gradient = (
            None if gradient is None else gradient.mul_(upstream.to(gradient.dtype)) for gradient in gradients
        )
        return state_gradient, weight_gradient, None, None


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return what a matrix product of the tensor would compute in here: autocast's dtype, or its own."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype
