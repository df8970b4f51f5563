"""Splits the global batch into micro-batches, one for each forward and backward pass of each process.

Shape letters: B rows of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from attrs import evolve, frozen
from numpy.typing import NDArray
from torch import Tensor

from weighted_mtp_core.api import Batch
from weighted_mtp_core.data.batches import preceding, split_rows
from weighted_mtp_core.runtime.distributed import Distributed


@frozen(kw_only=True, eq=False)
class MicroBatch:
    """Some rows of the global batch.

    Attributes:
        batch: The rows.
        rows: Indices of the rows in the global batch.
        share: Share of the global batch's rows that this micro-batch contains; 0 for a spare micro-batch,
            which does not contribute to the gradient.
    """

    batch: Batch
    rows: slice
    share: float

    @property
    def is_spare(self) -> bool:
        """Whether the micro-batch exists only so that this process takes part in collective operations."""
        return self.share == 0

    def select(self, tensor: Tensor, *, spare: float) -> Tensor:
        """Return this micro-batch's rows of a global tensor; a spare micro-batch gets the value `spare`."""
        return torch.full_like(tensor[self.rows], spare) if self.is_spare else tensor[self.rows]

    @property
    def preceding_BT(self) -> NDArray[np.int64] | None:
        """`CollatedBatch.preceding_BT` of the rows; None if the batch is not a `CollatedBatch`.

        All entries are 0 in a spare micro-batch, which has no targets.
        """
        preceding_BT = preceding(self.batch)
        return np.zeros_like(preceding_BT) if self.is_spare and preceding_BT is not None else preceding_BT


def micro_batches(
    batch: Batch, accumulation: int, distributed: Distributed, *, together: int = 1
) -> list[MicroBatch]:
    """Return this process's micro-batches; every process gets the same number of micro-batches.

    Args:
        batch: The global batch.
        accumulation: Maximum number of micro-batches per process; a small batch gives fewer.
        distributed: The processes that train together.
        together: Number of consecutive rows that must stay in the same micro-batch.
    """
    split, first = [], 0
    for rows in split_rows(batch, accumulation * distributed.size, together=together):
        last = first + len(rows.ids_BT)
        share = (last - first) / len(batch.ids_BT)
        split.append(MicroBatch(batch=rows, rows=slice(first, last), share=share))
        first = last
    return distributed.shard_evenly(split, spare=evolve(split[0], share=0.0))


def gather_rows(
    parts: Sequence[MicroBatch], values: Sequence[Tensor], *, rows: int, distributed: Distributed
) -> Tensor:
    """Combine values of the micro-batches of all processes into one tensor `[B, ...]` for the global batch.

    Args:
        parts: This process's micro-batches.
        values: One tensor for each micro-batch in `parts`, with a row for each row of the micro-batch.
        rows: B, the number of rows of the global batch.
        distributed: The processes that train together.
    """
    gathered = values[0].new_zeros((rows, *values[0].shape[1:]))
    for part, value in zip(parts, values, strict=True):
        if not part.is_spare:
            gathered[part.rows] = value
    distributed.all_reduce(gathered)
    return gathered
