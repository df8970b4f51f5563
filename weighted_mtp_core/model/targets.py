"""Aligns tokens with the heads that predict them, and masks targets in another document.

Labels of K heads are shifted along T only in this module; `heads/` shifts the inputs of `sequential` heads.

Shape letters: B rows, T positions, K heads, N selected positions or pairs.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weighted_mtp_core.api import Batch
from weighted_mtp_core.runtime.device import to_device

Counts = NDArray[np.int64]

IGNORED = -100
"""The label of a pair that does not count; PyTorch's loss functions ignore this label by default."""


def align_labels(ids_BT: Tensor, *, document_BT: Tensor, response_BT: Tensor, n_future: int) -> Tensor:
    """Return int64 labels: `labels_BTK[b, t, k - 1] = ids_BT[b, t + k]` if the pair counts, otherwise -100.

    A pair (t, k) consists of the source token at position t and head k, which predicts the target at t + k. A
    pair counts if its target is a response token and belongs to the same document as its source. The source
    of a pair may be a prompt token. Pairs with padding (document -1) do not count.

    Args:
        ids_BT: int64 token ids.
        document_BT: int64 document number within the row, -1 on padding.
        response_BT: bool, True on response tokens.
        n_future: K, the number of heads.
    """
    labels_BTK = ids_BT.new_full((*ids_BT.shape, n_future), IGNORED)
    for k in range(1, min(n_future, ids_BT.shape[1] - 1) + 1):
        counts = response_BT[:, k:] & (document_BT[:, k:] == document_BT[:, :-k]) & (document_BT[:, :-k] >= 0)
        labels_BTK[:, :-k, k - 1] = torch.where(counts, ids_BT[:, k:], IGNORED)
    return labels_BTK


def batch_labels(batch: Batch, n_future: int) -> Tensor:
    """Return the labels `[B, T, K]` of a batch, see `align_labels`."""
    return align_labels(
        batch.ids_BT, document_BT=batch.document_BT, response_BT=batch.response_BT, n_future=n_future
    )


def target_mask(labels_BTK: Tensor) -> Tensor:
    """Return bool `[B, T, K]`, True for pairs that count."""
    return labels_BTK != IGNORED


def source_index(label_BT: Tensor, *, k: int, preceding_BT: Counts | None) -> Tensor:
    """Return the sources of head k's counted pairs, int64 indices `[N]` into the flattened `[B, T]`.

    Args:
        label_BT: Labels of head k.
        k: Number of the head, from 1.
        preceding_BT: `CollatedBatch.preceding_BT`; if None, the indices are computed on the device, and the
            host waits for the device.
    """
    if preceding_BT is None:
        return target_mask(label_BT).flatten().nonzero()[:, 0]
    return to_device(np.flatnonzero(preceding_BT >= k) - k, label_BT.device)


def sources(preceding_BT: Counts, n_future: int) -> Counts:
    """Return the sources of the counted pairs of all heads, each once and in ascending order.

    Args:
        preceding_BT: `CollatedBatch.preceding_BT`.
        n_future: K.

    Returns:
        int64 indices into the flattened `[B, T]`.
    """
    return np.unique(np.concatenate([np.flatnonzero(preceding_BT >= k) - k for k in range(1, n_future + 1)]))


def pair_index(target_BTK: Tensor, *, preceding_BT: Counts | None) -> Tensor:
    """Return the counted pairs as int64 indices `[N]` into the flattened `[B, T, K]`; see `source_index`."""
    if preceding_BT is None:
        return target_BTK.flatten().nonzero()[:, 0]
    heads = target_BTK.shape[2]
    pairs = [(np.flatnonzero(preceding_BT >= k) - k) * heads + k - 1 for k in range(1, heads + 1)]
    return to_device(np.sort(np.concatenate(pairs)), target_BTK.device)


def choices_of_head_1(choice_BTK: Tensor) -> Tensor:
    """Return, for each (position, head) pair, head 1's prediction of the pair's target, `[B, T, K]`.

    The result is -100 where head 1 has no prediction that counts.

    Args:
        choice_BTK: int64 predicted token ids, by source and head; -100 for a pair that does not count.
    """
    heads = choice_BTK.shape[2]
    padded_BT = torch.nn.functional.pad(choice_BTK[:, :, 0], (0, heads - 1), value=IGNORED)
    return padded_BT.unfold(1, heads, 1)  # for the pair (t, k), head 1 predicts the target at t + k - 1


def take(x_BT: Tensor, index_N: Tensor) -> Tensor:
    """Return the values `[N, ...]` at the positions `index_N` of the flattened `[B, T]`."""
    return x_BT.flatten(0, 1).index_select(0, index_N)
