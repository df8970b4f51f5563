"""The weighted multi-token loss and its gradients, without ever holding the `[B, T, K, V]` logits.

`L = sum_k alpha_k * sum_t w[t, k] * CE(head_k(h_t), x[t + k]) / Z_k`, after Gloeckle et al. 2024 (eq. 2) with
weights. Heads run forward and backward one after the other (their section 2.2): the gradient of the trunk's
states adds up in one `[B, T, H]` buffer and goes through the trunk once, so that memory does not grow with K.
Rows that predict nothing are left out before the unembedding, and the gradient of a chunk's logits is formed
while they are there, so that nothing is kept or computed twice. `loss_reference` is the same in plain words.

Shape letters: B rows, T positions, K heads, N counted pairs of one head, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor, nn

from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import source_index, target_mask

CHUNK = 192
"""The most pairs whose logits exist at one time: 192 x 49152 in fp32 are 36 MiB."""

_ROOM = 36 << 20  # bytes that logits and the states' gradients share, where CHUNK rows do not need more
_FEWEST = 64  # rows, below which the products are slower than the memory saved is worth


@frozen(kw_only=True, eq=False)
class MtpLoss:
    """The loss of a batch and its sums by head, all fp32 and without gradient.

    Attributes:
        loss: Scalar.
        ce_sum_K: Sum of the unweighted cross-entropies, in nats.
        count_K: How many pairs counted.
    """

    loss: Tensor
    ce_sum_K: Tensor
    count_K: Tensor


@frozen(kw_only=True, eq=False)
class HeadSums:
    """What the heads are worth, as float32 sums over the counted pairs.

    Attributes:
        ce_sum_K: Of the unweighted cross-entropies, in nats.
        correct_K: Of the pairs whose target was the most likely token.
        count_K: Of the pairs.
    """

    ce_sum_K: Tensor
    correct_K: Tensor
    count_K: Tensor


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
    detach_trunk: bool = False,
    position_BT: Tensor | None = None,
    preceding_BT: NDArray[np.int64] | None = None,
) -> MtpLoss:
    """Return the loss of trunk states, having added its gradient to every parameter's `grad`.

    There is no `backward` to call: it is done, head by head, then through the trunk, whose graph is used up.

    Args:
        policy: Heads and unembedding.
        hidden_BTH: Trunk states, with their graph; without one, the trunk gets no gradient.
        labels_BTK: From `align_labels`.
        weight_BTK: float32, 0 where nothing counts; None means 1 everywhere.
        normaliser_K: Z by head, of the *global* batch: parts of an accumulated batch add up exactly.
        head_share_K: alpha by head.
        detach_trunk: Whether heads 2..K leave the trunk alone.
        position_BT: From `Batch.position_BT`.
        preceding_BT: From `CollatedBatch.preceding_BT`; without it, each head waits for the device.
    """
    target_BTK = target_mask(labels_BTK)
    scale_K = head_share_K / normaliser_K
    source_BTH = hidden_BTH.detach().requires_grad_(hidden_BTH.requires_grad)
    # Of the states' gradient there are two at one time: a head's, and the sum over heads.
    unembedding = _Unembedding.of(policy, hidden_BTH, beside=2 * hidden_BTH.nbytes)
    losses, ce_sums = [], []
    for k in range(1, policy.n_future + 1):
        label_BT = labels_BTK[:, :, k - 1]
        scale_BT = scale_K[k - 1].expand(label_BT.shape)
        index_N = source_index(label_BT, k=k, preceding_BT=preceding_BT)
        with policy.asked_of_head(k, index_N):
            loss, ce_sum = _learn_head(
                policy.head_states(
                    k, source_BTH.detach() if detach_trunk and k > 1 else source_BTH, position_BT=position_BT
                ),
                unembedding,
                index_N=index_N,
                label_BT=label_BT,
                scale_BT=scale_BT if weight_BTK is None else weight_BTK[:, :, k - 1].float() * scale_BT,
            )
        losses.append(loss)
        ce_sums.append(ce_sum)
    if source_BTH.grad is not None:
        _backward(hidden_BTH, source_BTH.grad)
    return MtpLoss(
        loss=torch.stack(losses).sum(),
        ce_sum_K=torch.stack(ce_sums),
        count_K=target_BTK.sum(dim=(0, 1), dtype=torch.float32),
    )


def _learn_head(
    state_BTH: Tensor, unembedding: _Unembedding, *, index_N: Tensor, label_BT: Tensor, scale_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Take a head's states back to what they came from; return its loss and its sum of cross-entropies."""
    scale_N = _at(scale_BT, index_N)
    gradient_BTH = torch.zeros_like(state_BTH, memory_format=torch.contiguous_format)
    ce_N = unembedding.learn(
        state_BTH.detach(), index_N, _at(label_BT, index_N), scale_N=scale_N, gradient_BTH=gradient_BTH
    )
    if state_BTH.requires_grad:
        _backward(state_BTH, gradient_BTH)
    return (ce_N * scale_N).sum(), ce_N.sum()


def _at(x_BT: Tensor, index_N: Tensor) -> Tensor:
    """Return what lies at places of the flattened rows, `[N, ...]`."""
    return x_BT.flatten(0, 1).index_select(0, index_N)


def _backward(tensor: Tensor, gradient: Tensor) -> None:
    """Go backward outside of autocast, which is for forward passes."""
    with torch.autocast(tensor.device.type, enabled=False):
        torch.autograd.backward([tensor], [gradient])


@torch.no_grad()
def head_sums(
    policy: Policy,
    hidden_BTH: Tensor,
    labels_BTK: Tensor,
    *,
    position_BT: Tensor | None = None,
    preceding_BT: NDArray[np.int64] | None = None,
) -> HeadSums:
    """Measure each head on trunk states, unweighted; arguments are those of `weighted_mtp_loss`."""
    target_BTK = target_mask(labels_BTK)
    unembedding = _Unembedding.of(policy, hidden_BTH)
    sums = []
    for k in range(1, policy.n_future + 1):
        label_BT = labels_BTK[:, :, k - 1]
        index_N = source_index(label_BT, k=k, preceding_BT=preceding_BT)
        with policy.asked_of_head(k, index_N):
            state_BTH = policy.head_states(k, hidden_BTH, position_BT=position_BT)
        sums.append(unembedding.measure(state_BTH, index_N, _at(label_BT, index_N)))
    ce_sums, correct = zip(*sums, strict=True)
    return HeadSums(
        ce_sum_K=torch.stack(ce_sums),
        correct_K=torch.stack(correct),
        count_K=target_BTK.sum(dim=(0, 1), dtype=torch.float32),
    )


@torch.no_grad()
def token_losses(
    policy: Policy,
    hidden_BTH: Tensor,
    labels_BTK: Tensor,
    *,
    position_BT: Tensor | None = None,
    preceding_BT: NDArray[np.int64] | None = None,
) -> Tensor:
    """Return each pair's unweighted cross-entropy, float32 `[B, T, K]`, 0 where nothing counts."""
    return _by_pair(
        policy,
        hidden_BTH,
        labels_BTK,
        position_BT=position_BT,
        preceding_BT=preceding_BT,
        measure=_Unembedding.losses,
    )


@torch.no_grad()
def token_entropies(
    policy: Policy,
    hidden_BTH: Tensor,
    labels_BTK: Tensor,
    *,
    position_BT: Tensor | None = None,
    preceding_BT: NDArray[np.int64] | None = None,
) -> Tensor:
    """Return the entropy of each pair's prediction in nats, float32 `[B, T, K]`, 0 where nothing counts."""
    return _by_pair(
        policy,
        hidden_BTH,
        labels_BTK,
        position_BT=position_BT,
        preceding_BT=preceding_BT,
        measure=_Unembedding.entropies,
    )


def _by_pair(
    policy: Policy,
    hidden_BTH: Tensor,
    labels_BTK: Tensor,
    *,
    position_BT: Tensor | None,
    preceding_BT: NDArray[np.int64] | None,
    measure: Callable[[_Unembedding, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Measure the states and labels of each head's pairs; return it by pair, 0 elsewhere."""
    measured_BTK = torch.zeros(labels_BTK.shape, dtype=torch.float32, device=labels_BTK.device)
    unembedding = _Unembedding.of(policy, hidden_BTH)
    for k in range(1, policy.n_future + 1):
        label_BT = labels_BTK[:, :, k - 1]
        index_N = source_index(label_BT, k=k, preceding_BT=preceding_BT)
        with policy.asked_of_head(k, index_N):
            state_BTH = policy.head_states(k, hidden_BTH, position_BT=position_BT)
        measured_N = measure(unembedding, state_BTH, index_N, _at(label_BT, index_N))
        measured_BTK.flatten(0, 1)[:, k - 1].index_copy_(0, index_N, measured_N)
    return measured_BTK


@frozen(kw_only=True, eq=False)
class _Unembedding:
    """The unembedding's matrix for one pass over all heads, chunk by chunk of the pairs it is given.

    Pairs are given as states `[B, T, H]` and the index of their sources, int64 `[N]` into the flattened rows;
    a chunk's states are gathered when it is its turn.

    Attributes:
        parameter: The matrix that learns, `[V, H]`.
        matrix_VH: The same in the dtype that is computed in.
        logits_NV: Room for the logits of one chunk; room made anew for each would be page faults for each.
    """

    parameter: Tensor
    matrix_VH: Tensor
    logits_NV: Tensor

    @classmethod
    def of(cls, policy: Policy, hidden_BTH: Tensor, *, beside: int = 0) -> _Unembedding:
        """Cast it as a matrix product would be here: to autocast's dtype, or not at all.

        Args:
            policy: Whose unembedding it is.
            hidden_BTH: Trunk states, for their device.
            beside: Bytes that grow with the batch and exist beside the logits: chunks get smaller by them,
                so that memory does not grow with the batch.
        """
        parameter = policy.unembedding.weight
        device = hidden_BTH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameter.dtype
        matrix_VH = parameter.detach().to(dtype)
        row = len(matrix_VH) * matrix_VH.element_size()
        rows = min(CHUNK, max(_FEWEST, (max(_ROOM, CHUNK * row) - beside) // row))
        return cls(
            parameter=parameter, matrix_VH=matrix_VH, logits_NV=matrix_VH.new_empty(rows, len(matrix_VH))
        )

    @torch.no_grad()
    def learn(
        self, state_BTH: Tensor, index_N: Tensor, label_N: Tensor, *, scale_N: Tensor, gradient_BTH: Tensor
    ) -> Tensor:
        """Return each pair's cross-entropy, float32 `[N]`.

        The states' gradient of `sum_n scale_n * CE_n` goes to `gradient_BTH`, that of the matrix is added to
        its `grad`: a buffer a head would cost two passes over it each.
        """
        state_SH, gradient_SH = state_BTH.flatten(0, 1), gradient_BTH.flatten(0, 1)
        ce_N = torch.empty(len(label_N), dtype=torch.float32, device=label_N.device)
        for rows in self._chunks(len(label_N)):
            index = index_N[rows]
            state = state_SH.index_select(0, index).to(self.matrix_VH.dtype)
            ce_N[rows], gradient = self._learn_chunk(state, label_N[rows, None], scale=scale_N[rows, None])
            gradient_SH.index_copy_(0, index, gradient.to(gradient_SH.dtype))
        return ce_N

    def _learn_chunk(self, state: Tensor, label: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Do what `learn` does with one chunk, on its logits in place: each pass over them counts."""
        logits = self._logits(state)
        target = logits.sub_(logits.amax(dim=-1, keepdim=True)).gather(1, label)
        total = logits.exp_().sum(dim=-1, keepdim=True)
        gradient = logits.mul_(scale / total).scatter_add_(1, label, -scale).to(state.dtype)
        gradient_VH = self._gradient()
        if gradient_VH is not None and gradient_VH.dtype == gradient.dtype:
            gradient_VH.addmm_(gradient.T, state)
        elif gradient_VH is not None:
            gradient_VH += gradient.T @ state
        return (total.log() - target)[:, 0], gradient @ self.matrix_VH

    @torch.no_grad()
    def losses(self, state_BTH: Tensor, index_N: Tensor, label_N: Tensor) -> Tensor:
        """Return each pair's cross-entropy, float32 `[N]`."""
        ce_N = torch.zeros(len(index_N), device=index_N.device)
        for rows, logits in self._all_logits(state_BTH, index_N):
            ce_N[rows] = nn.functional.cross_entropy(logits, label_N[rows], reduction="none")
        return ce_N

    @torch.no_grad()
    def entropies(self, state_BTH: Tensor, index_N: Tensor, _: Tensor) -> Tensor:
        """Return the entropy of each pair's prediction, float32 `[N]`; labels have no say in it."""
        entropy_N = torch.zeros(len(index_N), device=index_N.device)
        for rows, logits in self._all_logits(state_BTH, index_N):
            log_p = logits.log_softmax(dim=-1)
            entropy_N[rows] = -(log_p.exp() * log_p).sum(dim=-1)
        return entropy_N

    @torch.no_grad()
    def measure(self, state_BTH: Tensor, index_N: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the float32 sums of the pairs' cross-entropies and of how many labels were the top token."""
        ce, correct = torch.zeros(2, device=index_N.device).unbind()
        for rows, logits in self._all_logits(state_BTH, index_N):
            ce = ce + nn.functional.cross_entropy(logits, label_N[rows], reduction="sum")
            correct = correct + (logits.argmax(dim=-1) == label_N[rows]).sum(dtype=torch.float32)
        return ce, correct

    def _all_logits(self, state_BTH: Tensor, index_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield chunks of pairs and their logits, which last until the next chunk's."""
        state_SH = state_BTH.flatten(0, 1)
        for rows in self._chunks(len(index_N)):
            yield rows, self._logits(state_SH.index_select(0, index_N[rows]))

    def _logits(self, state_NH: Tensor) -> Tensor:
        """Return the rows' logits, float32 `[N, V]`; they last until the next call."""
        room = self.logits_NV[: len(state_NH)]
        return torch.mm(state_NH.to(self.matrix_VH.dtype), self.matrix_VH.T, out=room).float()

    def _gradient(self) -> Tensor | None:
        """Return the buffer of the matrix's gradient, made if there is none; None if it does not learn."""
        if not self.parameter.requires_grad:
            return None
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return self.parameter.grad

    def _chunks(self, count: int) -> Iterator[slice]:
        """Yield runs of pairs that cover `count` of them."""
        for first in range(0, count, len(self.logits_NV)):
            yield slice(first, first + len(self.logits_NV))
