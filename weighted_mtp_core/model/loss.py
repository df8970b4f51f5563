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

CHUNK = 256
"""Pairs whose logits exist at one time: 256 x 49152 in fp32 are 48 MiB."""


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
    reach_BT: NDArray[np.int64] | None = None,
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
        reach_BT: From `Batch.reach_BT`; without it, each head waits for the device.
    """
    target_BTK = target_mask(labels_BTK)
    scale_K = head_share_K / normaliser_K
    source_BTH = hidden_BTH.detach().requires_grad_(hidden_BTH.requires_grad)
    unembedding = _Unembedding.of(policy, hidden_BTH)
    losses, ce_sums = [], []
    for k in range(1, policy.n_future + 1):
        label_BT = labels_BTK[:, :, k - 1]
        scale_BT = scale_K[k - 1].expand(label_BT.shape)
        loss, ce_sum = _learn_head(
            policy.head_states(
                k, source_BTH.detach() if detach_trunk and k > 1 else source_BTH, position_BT=position_BT
            ),
            unembedding,
            index_N=source_index(label_BT, k=k, reach_BT=reach_BT),
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
    ce_N, gradient_NH = unembedding.learn(
        _at(state_BTH.detach(), index_N), _at(label_BT, index_N), scale_N=scale_N
    )
    if state_BTH.requires_grad:
        gradient_BTH = torch.zeros_like(state_BTH, memory_format=torch.contiguous_format)
        gradient_BTH.flatten(0, 1).index_copy_(0, index_N, gradient_NH)
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
    reach_BT: NDArray[np.int64] | None = None,
) -> HeadSums:
    """Measure each head on trunk states, unweighted; arguments are those of `weighted_mtp_loss`."""
    target_BTK = target_mask(labels_BTK)
    unembedding = _Unembedding.of(policy, hidden_BTH)
    sums = []
    for k in range(1, policy.n_future + 1):
        label_BT = labels_BTK[:, :, k - 1]
        index_N = source_index(label_BT, k=k, reach_BT=reach_BT)
        state_BTH = policy.head_states(k, hidden_BTH, position_BT=position_BT)
        sums.append(unembedding.measure(_at(state_BTH, index_N), _at(label_BT, index_N)))
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
    reach_BT: NDArray[np.int64] | None = None,
) -> Tensor:
    """Return each pair's unweighted cross-entropy, float32 `[B, T, K]`, 0 where nothing counts."""
    return _by_pair(
        policy,
        hidden_BTH,
        labels_BTK,
        position_BT=position_BT,
        reach_BT=reach_BT,
        measure=_Unembedding.losses,
    )


@torch.no_grad()
def token_entropies(
    policy: Policy,
    hidden_BTH: Tensor,
    labels_BTK: Tensor,
    *,
    position_BT: Tensor | None = None,
    reach_BT: NDArray[np.int64] | None = None,
) -> Tensor:
    """Return the entropy of each pair's prediction in nats, float32 `[B, T, K]`, 0 where nothing counts."""
    return _by_pair(
        policy,
        hidden_BTH,
        labels_BTK,
        position_BT=position_BT,
        reach_BT=reach_BT,
        measure=_Unembedding.entropies,
    )


def _by_pair(
    policy: Policy,
    hidden_BTH: Tensor,
    labels_BTK: Tensor,
    *,
    position_BT: Tensor | None,
    reach_BT: NDArray[np.int64] | None,
    measure: Callable[[_Unembedding, Tensor, Tensor], Tensor],
) -> Tensor:
    """Measure the states `[N, H]` and labels `[N]` of each head's pairs; return it by pair, 0 elsewhere."""
    measured_BTK = torch.zeros(labels_BTK.shape, dtype=torch.float32, device=labels_BTK.device)
    unembedding = _Unembedding.of(policy, hidden_BTH)
    for k in range(1, policy.n_future + 1):
        label_BT = labels_BTK[:, :, k - 1]
        index_N = source_index(label_BT, k=k, reach_BT=reach_BT)
        state_BTH = policy.head_states(k, hidden_BTH, position_BT=position_BT)
        measured_N = measure(unembedding, _at(state_BTH, index_N), _at(label_BT, index_N))
        measured_BTK.flatten(0, 1)[:, k - 1].index_copy_(0, index_N, measured_N)
    return measured_BTK


@frozen(kw_only=True, eq=False)
class _Unembedding:
    """The unembedding's matrix for one pass over all heads, chunk by chunk of the rows it is given.

    Attributes:
        parameter: The matrix that learns, `[V, H]`.
        matrix_VH: The same in the dtype that is computed in.
        logits_NV: Room for the logits of one chunk; room made anew for each would be page faults for each.
    """

    parameter: Tensor
    matrix_VH: Tensor
    logits_NV: Tensor

    @classmethod
    def of(cls, policy: Policy, hidden_BTH: Tensor) -> _Unembedding:
        """Cast it as a matrix product would be here: to autocast's dtype, or not at all."""
        parameter = policy.unembedding.weight
        device = hidden_BTH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameter.dtype
        matrix_VH = parameter.detach().to(dtype)
        return cls(
            parameter=parameter, matrix_VH=matrix_VH, logits_NV=matrix_VH.new_empty(CHUNK, len(matrix_VH))
        )

    @torch.no_grad()
    def learn(self, state_NH: Tensor, label_N: Tensor, *, scale_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's cross-entropy, and the states' gradient of `sum_n scale_n * CE_n`.

        The matrix's own gradient is added to its `grad`: a buffer a head would cost two passes over it each.
        """
        ce_N = torch.empty(len(label_N), dtype=torch.float32, device=label_N.device)
        gradient_NH = torch.empty_like(state_NH)
        for rows in _chunks(len(label_N)):
            ce_N[rows], gradient_NH[rows] = self._learn_chunk(
                state_NH[rows].to(self.matrix_VH.dtype), label_N[rows, None], scale=scale_N[rows, None]
            )
        return ce_N, gradient_NH

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
    def losses(self, state_NH: Tensor, label_N: Tensor) -> Tensor:
        """Return each row's cross-entropy, float32 `[N]`."""
        ce_N = torch.zeros(len(state_NH), device=state_NH.device)
        for rows in _chunks(len(state_NH)):
            logits = self._logits(state_NH[rows])
            ce_N[rows] = nn.functional.cross_entropy(logits, label_N[rows], reduction="none")
        return ce_N

    @torch.no_grad()
    def entropies(self, state_NH: Tensor, _: Tensor) -> Tensor:
        """Return the entropy of each row's prediction, float32 `[N]`; labels have no say in it."""
        entropy_N = torch.zeros(len(state_NH), device=state_NH.device)
        for rows in _chunks(len(state_NH)):
            log_p = self._logits(state_NH[rows]).log_softmax(dim=-1)
            entropy_N[rows] = -(log_p.exp() * log_p).sum(dim=-1)
        return entropy_N

    @torch.no_grad()
    def measure(self, state_NH: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the float32 sums of the rows' cross-entropies and of how many labels were the top token."""
        ce, correct = torch.zeros(2, device=state_NH.device).unbind()
        for rows in _chunks(len(state_NH)):
            logits = self._logits(state_NH[rows])
            ce = ce + nn.functional.cross_entropy(logits, label_N[rows], reduction="sum")
            correct = correct + (logits.argmax(dim=-1) == label_N[rows]).sum(dtype=torch.float32)
        return ce, correct

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


def _chunks(count: int) -> Iterator[slice]:
    """Yield runs of rows that cover `count` of them."""
    for first in range(0, count, CHUNK):
        yield slice(first, first + CHUNK)
