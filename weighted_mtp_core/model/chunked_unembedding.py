"""Computes the logits of selected positions in chunks, so that the `[B, T, K, V]` logits never exist at once.

The gradient of the loss with respect to a chunk's logits is computed while these logits are in memory, so for
the backward pass no logits are stored or computed again.

Shape letters: B rows, T positions, S = B T positions of the flattened [B, T], of which N are selected, U
distinct tokens, K heads, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.unembedding import Unembedding, gradient_of
from weighted_mtp_core.runtime.device import memory_of
from weighted_mtp_core.runtime.products import ROWS, product, write_product

CHUNK = 192
"""Maximum number of rows of logits in a chunk, except on CUDA; 192 x 49152 logits in fp32 take 36 MiB."""

MOST_ROWS = 4096
"""Maximum number of rows of logits in a chunk on CUDA; more rows do not make the matrix products faster."""

_BUDGET = 36 << 20  # bytes for logits and `extra_bytes` together; CHUNK rows of logits may need more
_COLUMNS = 1024  # columns of logits that a CPU computes at once, because oneDNN needs a tensor for them
_FEWEST = 64  # rows; fewer rows save little memory but slow down the matrix products
_SHARE = 64  # logits take at most 1/64 of a CUDA device's memory, unless CHUNK rows need more
_BYTES_PER_LOGIT = 8  # on a CUDA device: a bfloat16 logit, its float32 copy, and its bfloat16 gradient


def chunk_rows(vocab_size: int, itemsize: int, *, extra_bytes: int, memory: int | None) -> int:
    """Return the number of rows of logits in a chunk.

    On a CUDA device, chunks may be larger than on a CPU, because a chunk of 192 rows would leave hundreds of
    arithmetic units idle, and there is more memory.

    Args:
        vocab_size: Number of logits in a row.
        itemsize: Number of bytes of a logit; not used on CUDA, where 8 bytes per logit are assumed.
        extra_bytes: Bytes of other memory that is in use at the same time as the logits; they grow with the
            batch. Except on CUDA, many `extra_bytes` make chunks smaller, down to 64 rows, so that the total
            memory grows less.
        memory: Memory of the CUDA device in bytes; None for other devices.
    """
    if memory is None:
        row_bytes = vocab_size * itemsize
        rows = (max(_BUDGET, CHUNK * row_bytes) - extra_bytes) // row_bytes
        return min(CHUNK, max(_FEWEST, rows // ROWS * ROWS))
    rows = memory // _SHARE // (vocab_size * _BYTES_PER_LOGIT)
    return min(MOST_ROWS, max(CHUNK, rows // _FEWEST * _FEWEST))


def add_embedding_rows(policy: Policy) -> None:
    """Let the trunk's backward pass add only the rows of the batch's tokens to a tied embedding's gradient.

    Otherwise PyTorch makes a second gradient of the size of the embedding, mostly zeros, and adds this whole
    gradient. The sums are rounded in the same way. The tensor to which the rows are added must exist before
    this backward pass; `weighted_mtp_loss` makes it. Nothing changes for a sharded embedding, or on a CUDA
    device, where the number of rows is known only after the device has finished.
    """
    trunk: Any = policy.trunk
    embedding, matrix = trunk.get_input_embeddings(), policy.unembedding.weight
    tied = embedding.weight is matrix and not isinstance(matrix, DTensor)
    embedding.sparse = tied and memory_of(matrix.device) is None
    if embedding.sparse and matrix.requires_grad:
        matrix.register_hook(_sum_of_equal_rows)  # type: ignore[no-untyped-call]


def _sum_of_equal_rows(gradient: Tensor) -> Tensor:
    """Sum the rows of a sparse gradient that belong to the same token, in the order of the text."""
    if not gradient.is_sparse:
        return gradient
    # The public methods are for gradients whose rows have been summed already.
    token_N, row_NH = gradient._indices()[0], gradient._values()  # noqa: SLF001
    token_U, place_N = torch.unique(token_N, return_inverse=True)
    sum_UH = row_NH.new_zeros(len(token_U), row_NH.shape[1]).index_add_(0, place_N, row_NH)
    return torch.sparse_coo_tensor(
        token_U[None], sum_UH, gradient.shape, is_coalesced=True, check_invariants=False
    )


@frozen(kw_only=True, eq=False)
class Teacher:
    """Head 1, whose predictions are the targets of another head.

    Attributes:
        state_BTH: The states that the unembedding reads for head 1, without a gradient.
        ahead: The distance k - 1 from the source of head k to the source from which head 1 predicts the same
            token.
        label_share: Share of the label in the target distribution, 0 to 1; the rest is head 1's distribution.
    """

    state_BTH: Tensor
    ahead: int
    label_share: float


@frozen(kw_only=True, eq=False)
class ChunkedUnembedding:
    """The unembedding of a policy, prepared for one pass over all heads.

    The methods `learn`, `losses`, `entropies` and `choices` receive the states of all positions, `[B, T, H]`,
    and the int64 indices `[N]` of the selected positions; each chunk gathers only the states that it needs.

    Attributes:
        unembedding: The unembedding of the policy.
        matrix_VH: The matrix of the unembedding in the dtype of the matrix products.
        logits_NV: Buffer for the logits of one chunk, reused by all chunks, because allocating a buffer for
            each chunk costs page faults.
        teacher_NV: Buffer for the teacher's logits of one chunk; empty if there is no teacher.
        learns: Whether `learn` adds to the gradients of the unembedding's trained parameters.
    """

    unembedding: Unembedding
    matrix_VH: Tensor
    logits_NV: Tensor
    teacher_NV: Tensor
    learns: bool

    def frozen(self) -> ChunkedUnembedding:
        """Return a copy whose matrix and bias get no gradient; the copy uses the same buffers."""
        return evolve(self, learns=False)

    @classmethod
    def of(
        cls, policy: Policy, hidden_BTH: Tensor, *, extra_bytes: int = 0, teaches: bool = False
    ) -> ChunkedUnembedding:
        """Prepare a policy's unembedding; if autocast is enabled, the matrix is cast to autocast's dtype.

        Args:
            policy: The policy.
            hidden_BTH: Trunk states, of which only the device is used.
            extra_bytes: Bytes of other memory in use, see `chunk_rows`.
            teaches: Whether `learn` will be called with a teacher.
        """
        unembedding, device = policy.unembedding, hidden_BTH.device.type
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if casts else unembedding.dtype
        matrix_VH = unembedding.matrix(dtype).detach()
        rows = chunk_rows(
            len(matrix_VH),
            matrix_VH.element_size(),
            extra_bytes=extra_bytes,
            memory=memory_of(hidden_BTH.device),
        )
        logits_NV = matrix_VH.new_empty(rows, len(matrix_VH))
        return cls(
            unembedding=unembedding,
            matrix_VH=matrix_VH,
            logits_NV=logits_NV,
            teacher_NV=torch.empty_like(logits_NV) if teaches else logits_NV[:0],
            learns=any(each.requires_grad for each in policy.unembedding.parameters()),
        )

    @torch.no_grad()
    def learn(
        self,
        state_BTH: Tensor,
        index_N: Tensor,
        label_N: Tensor,
        *,
        scale_N: Tensor,
        gradient_BTH: Tensor,
        teacher: Teacher | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return losses and cross-entropies, float32 `[N]`, and compute the gradients of `scale_N @ loss_N`.

        Without a teacher, a loss is the cross-entropy CE. With a teacher, a loss is
        `s CE + (1 - s) KL(p || q)`, where s is `label_share`, q is the prediction of the head, and p is head
        1's prediction of the same token.

        The gradient with respect to the states is written to the selected positions of `gradient_BTH`. If
        `learns` is true, the gradients with respect to matrix and bias, unless these are frozen, are added
        directly to their attribute `grad` (for a sharded matrix, to a buffer), because a separate buffer per
        head would cost two more passes over memory.
        """
        state_SH, gradient_SH = state_BTH.flatten(0, 1), gradient_BTH.flatten(0, 1)
        loss_N, ce_N = torch.empty(2, len(label_N), dtype=torch.float32, device=label_N.device)
        for rows in self.chunks(len(label_N)):
            index, scale = index_N[rows], scale_N[rows, None]
            state = state_SH.index_select(0, index).to(self.matrix_VH.dtype)
            loss_N[rows], ce_N[rows], gradient = self._learn_chunk(
                state, label_N[rows, None], scale=scale, index=index, teacher=teacher
            )
            gradient_SH.index_copy_(0, index, gradient.to(gradient_SH.dtype))
        return loss_N, ce_N

    def _learn_chunk(
        self, state: Tensor, label: Tensor, *, scale: Tensor, index: Tensor, teacher: Teacher | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do the work of `learn` for one chunk, and change the logits in place to save passes over memory."""
        logits = self._logits(state, self.logits_NV)
        slope = None if self.unembedding.is_plain else self.unembedding.slope(logits)
        target = logits.sub_(logits.amax(dim=-1, keepdim=True)).gather(1, label)
        if teacher is None:
            total = logits.exp_().sum(dim=-1, keepdim=True)
            loss = ce = (total.log() - target)[:, 0]
            gradient = logits.mul_(scale / total).scatter_add_(1, label, -scale)
        else:
            share, state_SH = teacher.label_share, teacher.state_BTH.flatten(0, 1)
            p = self._logits(state_SH.index_select(0, index + teacher.ahead), self.teacher_NV)
            p = p.sub_(p.amax(dim=-1, keepdim=True)).exp_()
            p /= p.sum(dim=-1, keepdim=True)
            expected = torch.special.entr(p).addcmul_(p, logits).sum(dim=-1)  # mean of logits - log p under p
            total = logits.exp_().sum(dim=-1, keepdim=True)
            ce = (total.log() - target)[:, 0]
            loss = share * ce + (1 - share) * (total.log()[:, 0] - expected)
            gradient = logits.mul_(scale / total).sub_(p.mul_((1 - share) * scale))
            gradient.scatter_add_(1, label, -share * scale)
        if slope is not None:
            gradient *= slope
        gradient = gradient.to(state.dtype)
        gradient_of_state = product(gradient, self.matrix_VH.T)
        if not self.learns:
            return loss, ce, gradient_of_state
        gradient_V = gradient_of(self.unembedding.bias)
        if gradient_V is not None:
            gradient_V += gradient.sum(dim=0, dtype=gradient_V.dtype)
        self.unembedding.add_matrix_gradient(gradient, state)
        return loss, ce, gradient_of_state

    def losses(self, state_BTH: Tensor, index_N: Tensor, label_N: Tensor) -> Tensor:
        """Return the cross-entropy of each prediction in nats, float32 `[N]`."""
        ce_N = torch.zeros(len(index_N), device=index_N.device)
        for rows, logits in self._all_logits(state_BTH, index_N):
            ce_N[rows] = nn.functional.cross_entropy(logits, label_N[rows], reduction="none")
        return ce_N

    def entropies(self, state_BTH: Tensor, index_N: Tensor, _: Tensor) -> Tensor:
        """Return the entropy of each prediction in nats, float32 `[N]`; labels do not affect it."""
        entropy_N = torch.zeros(len(index_N), device=index_N.device)
        for rows, logits in self._all_logits(state_BTH, index_N):
            log_p = logits.log_softmax(dim=-1)
            entropy_N[rows] = -(log_p.exp() * log_p).sum(dim=-1)
        return entropy_N

    def choices(self, state_BTH: Tensor, index_N: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the cross-entropies in nats, and the likeliest tokens, int64 `[N]`."""
        ce, choice_N = torch.zeros((), device=index_N.device), torch.empty_like(label_N)
        for rows, logits in self._all_logits(state_BTH, index_N):
            ce = ce + nn.functional.cross_entropy(logits, label_N[rows], reduction="sum")
            choice_N[rows] = logits.argmax(dim=-1)
        return ce, choice_N

    def _all_logits(self, state_BTH: Tensor, index_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the slice and the logits of each chunk; the next chunk may overwrite these logits."""
        state_SH = state_BTH.flatten(0, 1)
        for rows in self.chunks(len(index_N)):
            yield rows, self._logits(state_SH.index_select(0, index_N[rows]), self.logits_NV)

    def _logits(self, state_NH: Tensor, buffer_NV: Tensor) -> Tensor:
        """Return logits of states, float32 `[N, V]`; the next call may overwrite the logits."""
        state_NH, out_NV = state_NH.to(self.matrix_VH.dtype), buffer_NV[: len(state_NH)]
        width = _COLUMNS if out_NV.device.type == "cpu" else len(self.matrix_VH)
        blocks = zip(torch.split(self.matrix_VH, width), torch.split(out_NV, width, dim=1), strict=True)
        for rows, columns in blocks:
            write_product(state_NH, rows, out_NM=columns)
        product_NV = out_NV.float()
        return product_NV if self.unembedding.is_plain else self.unembedding.shape_(product_NV)

    def chunks(self, count: int) -> Iterator[slice]:
        """Yield the slices of the chunks into which `count` rows are divided."""
        for first in range(0, count, len(self.logits_NV)):
            yield slice(first, first + len(self.logits_NV))
