"""Which head predicts which token, and the mask that forbids targets in another document.

This is the only module that shifts tokens to the sources that predict them.

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
"""The label of a pair that does not count, as everywhere in PyTorch."""


def align_labels(ids_BT: Tensor, *, document_BT: Tensor, response_BT: Tensor, n_future: int) -> Tensor:
    """Return `labels_BTK[b, t, k - 1] = x[b, t + k]` where the pair counts, -100 elsewhere.

    A pair counts if its target is a response token of the source's own document. Sources inside the prompt
    count; padding (document -1) and targets in another document of the row never do.

    Args:
        ids_BT: int64 token ids.
        document_BT: int64 document number within the row, -1 on padding.
        response_BT: bool, True on response tokens.
        n_future: K.
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
    """Return bool `[B, T, K]`, True where the pair counts."""
    return labels_BTK != IGNORED


def source_index(label_BT: Tensor, *, k: int, preceding_BT: Counts | None) -> Tensor:
    """Return the sources of head k's counted pairs, int64 `[N]` into the flattened `[B, T]`.

    Args:
        label_BT: Labels of head k.
        k: Head, from 1.
        preceding_BT: `CollatedBatch.preceding_BT`; without it, the index is read from the device, which
            waits.
    """
    if preceding_BT is None:
        return target_mask(label_BT).flatten().nonzero()[:, 0]
    return to_device(np.flatnonzero(preceding_BT >= k) - k, label_BT.device)


def pair_index(target_BTK: Tensor, *, preceding_BT: Counts | None) -> Tensor:
    """Return the counted pairs, int64 `[N]` into the flattened `[B, T, K]`; see `source_index`."""
    if preceding_BT is None:
        return target_BTK.flatten().nonzero()[:, 0]
    heads = target_BTK.shape[2]
    pairs = [(np.flatnonzero(preceding_BT >= k) - k) * heads + k - 1 for k in range(1, heads + 1)]
    return to_device(np.sort(np.concatenate(pairs)), target_BTK.device)


def take(x_BT: Tensor, index_N: Tensor) -> Tensor:
    """Return the values `[N, ...]` at positions of the flattened `[B, T]`."""
    return x_BT.flatten(0, 1).index_select(0, index_N)
