"""The weighted multi-token loss and its gradients; the `[B, T, K, V]` logits never exist in memory at once.

The loss is `L = sum_k alpha_k * sum_t w[t, k] * CE(head_k(h_t), x[t + k]) / Z_k` (Gloeckle et al. 2024,
eq. 2, with weights), where CE is the cross-entropy, alpha_k the loss share of head k, w[t, k] the weight of
the pair (t, k), h_t the trunk's state, x[t + k] the target token and Z_k the normaliser. Heads 2..K can also
learn from head 1: `loss.heads = "kl"` replaces the cross-entropy of head k at position t with KL(p || q), and
`loss.heads = "both"` replaces it with the mean of the cross-entropy and KL(p || q). Here q is the prediction
of head k at t, and p is the prediction of head 1 at t + k - 1; head 1 gets no gradient from KL(p || q).

Heads run forward and backward one after the other (Gloeckle et al., section 2.2). The gradients of the
trunk's states are summed in one `[B, T, H]` buffer and propagated through the trunk once, so memory does not
grow with K. If heads are chained (`sequential`), heads 2..K instead run backward together, after the forward
pass of the last head, and store two `[B, T, H]` buffers per head. The unembedding skips positions without a
target.

Shape letters: B rows, T positions, K heads, N counted pairs of one head, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from attrs import frozen
from torch import Tensor

from weighted_mtp_core.model.chunked_unembedding import ChunkedUnembedding, Teacher
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import Counts, source_index, take, target_mask
from weighted_mtp_core.recipe.schema import HeadTargets

_LABEL_SHARES: Mapping[HeadTargets, float] = {"labels": 1.0, "both": 0.5, "kl": 0.0}


@frozen(kw_only=True, eq=False)
class MtpLoss:
    """The loss of a batch and sums for each head, all float32 and without gradient.

    Attributes:
        loss_K: The part of the loss that each head adds.
        ce_sum_K: Sum of the unweighted cross-entropies of each head, in nats.
        count_K: Number of counted pairs of each head.
    """

    loss_K: Tensor
    ce_sum_K: Tensor
    count_K: Tensor

    @property
    def loss(self) -> Tensor:
        """Return the loss, a scalar."""
        return self.loss_K.sum()


def normalisers(weight_BTK: Tensor, target_BTK: Tensor, *, normalise: Literal["weights", "tokens"]) -> Tensor:
    """Return the normaliser Z of each head, float32 `[K]`.

    Z is the sum of |weight|, or the number of counted pairs if `normalise` is "tokens". If Z is 0 for a head,
    1 is returned instead, so that the loss and the gradient of the head are 0 and not NaN.
    """
    counted = weight_BTK.abs() if normalise == "weights" else target_BTK
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
    heads: HeadTargets = "labels",
    detach_trunk: bool = False,
    ids_BT: Tensor | None = None,
    position_BT: Tensor | None = None,
    preceding_BT: Counts | None = None,
) -> MtpLoss:
    """Return the loss, and add its gradient to the `grad` of each trained parameter of the policy.

    Do not call `backward` on the result: the gradient has already been propagated through each head and the
    trunk, and the trunk's graph has been freed.

    Args:
        policy: The policy, whose heads and unembedding are used.
        hidden_BTH: Trunk states with their autograd graph; without a graph, the trunk gets no gradient.
        labels_BTK: The result of `align_labels`.
        weight_BTK: float32 weights, 0 for pairs that do not count; None means weight 1 for all pairs.
        normaliser_K: Normaliser Z of each head for the whole step, so that the losses of micro-batches add up
            exactly.
        head_share_K: alpha, the loss share of each head.
        heads: What heads 2..K learn: the labels, head 1's distribution of the token that they draft, or both
            in equal shares.
        detach_trunk: Whether the losses of heads 2..K give a gradient only to the parameters of heads 2..K.
        ids_BT: Token ids, `Batch.ids_BT`; only `sequential` heads read them.
        position_BT: Positions, `Batch.position_BT`.
        preceding_BT: `CollatedBatch.preceding_BT`; if None, finding the pairs of each head synchronises with
            the device.
    """
    scale_K = head_share_K / normaliser_K
    source_BTH = hidden_BTH.detach().requires_grad_(hidden_BTH.requires_grad)
    share = _LABEL_SHARES[heads]
    chained = policy.heads.chained
    # These tensors exist at the same time: the gradient of one head, the sum of the heads' gradients and,
    # with a teacher, the teacher's states. Each chained head keeps a gradient and states of its own.
    buffers = (2 * policy.n_future if chained else 2) + (share < 1)
    unembedding = ChunkedUnembedding.of(
        policy, hidden_BTH, extra_bytes=buffers * hidden_BTH.nbytes, teaches=share < 1
    )
    labels = labels_BTK.unbind(dim=-1)
    rows = [source_index(each, k=k, preceding_BT=preceding_BT) for k, each in enumerate(labels, start=1)]
    states = policy.each_head_states(
        source_BTH, ids_BT=ids_BT, position_BT=position_BT, rows=rows, detach=detach_trunk
    )
    head_1_BTH: Tensor | None = None
    losses, ce_sums, pending = [], [], []
    for k, state_BTH in enumerate(states, start=1):
        scale_BT = scale_K[k - 1].expand(labels[k - 1].shape)
        if weight_BTK is not None:
            scale_BT = weight_BTK[:, :, k - 1].float() * scale_BT
        loss, ce_sum, gradient_BTH = _learn_head(
            state_BTH,
            unembedding.frozen() if detach_trunk and k > 1 else unembedding,
            index_N=rows[k - 1],
            label_BT=labels[k - 1],
            scale_BT=scale_BT,
            teacher=None
            if head_1_BTH is None
            else Teacher(state_BTH=head_1_BTH, ahead=k - 1, label_share=share),
        )
        if gradient_BTH is not None:
            pending.append((state_BTH, gradient_BTH))
        if pending and (not chained or k in (1, policy.n_future)):
            _backward(pending)
            pending.clear()
        if k == 1 and share < 1:
            head_1_BTH = state_BTH.detach()
        losses.append(loss)
        ce_sums.append(ce_sum)
        del state_BTH, gradient_BTH
    policy.unembedding.finish_gradient()
    del states, unembedding  # frees the buffer of logits before the trunk's backward pass
    if source_BTH.grad is not None:
        _backward([(hidden_BTH, source_BTH.grad)])
    return MtpLoss(
        loss_K=torch.stack(losses),
        ce_sum_K=torch.stack(ce_sums),
        count_K=target_mask(labels_BTK).sum(dim=(0, 1), dtype=torch.float32),
    )


def _learn_head(
    state_BTH: Tensor,
    unembedding: ChunkedUnembedding,
    *,
    index_N: Tensor,
    label_BT: Tensor,
    scale_BT: Tensor,
    teacher: Teacher | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a head's loss, the sum of its cross-entropies, and its states' gradient (None if not needed)."""
    scale_N = take(scale_BT, index_N)
    label_N = take(label_BT, index_N)
    if teacher is None and not state_BTH.requires_grad and not unembedding.learns:
        ce_N = unembedding.losses(state_BTH, index_N, label_N)
        return (ce_N * scale_N).sum(), ce_N.sum(), None
    gradient_BTH = torch.zeros_like(state_BTH, memory_format=torch.contiguous_format)
    loss_N, ce_N = unembedding.learn(
        state_BTH.detach(),
        index_N,
        label_N,
        scale_N=scale_N,
        gradient_BTH=gradient_BTH,
        teacher=teacher,
    )
    return (loss_N * scale_N).sum(), ce_N.sum(), gradient_BTH if state_BTH.requires_grad else None


def _backward(gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Propagate gradients with autocast disabled, because autocast is meant only for forward passes."""
    tensors, gradients_of_tensors = zip(*gradients, strict=True)
    device = tensors[0].device.type
    casts = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if casts else nullcontext():
        torch.autograd.backward(tensors, gradients_of_tensors)
