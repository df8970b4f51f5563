"""Which documents share a row: first-fit, in an order that is a pure function of (seed, epoch, position).

Shape letters: D documents, U documents of one block, R rows of one block.
"""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray

from weighted_mtp_core.data.batches import Rows
from weighted_mtp_core.errors import WmtpError

# Documents that are packed together. So many fill some 800 rows of ten: the few that stay half empty do not
# count, and an epoch begins as fast with a large corpus as with a small one.
_BLOCK = 8192


class PackedSampler:
    """Endless batches of rows that hold several documents each.

    Blocks of an epoch's shuffled documents are packed one after the other. Rows of a block are sorted by how
    full they are, cut into batches, and the batches shuffled; a block's last batch may have fewer rows.

    Args:
        length_D: Tokens of each document.
        row_tokens: Of a full row.
        batch_size: Rows of the global batch.
        seed: Of the order.

    Raises:
        WmtpError: There is no document.
    """

    def __init__(self, length_D: Rows, *, row_tokens: int, batch_size: int, seed: int) -> None:
        if not len(length_D):
            raise WmtpError("there is nothing to train on in the split `train`")
        self._length_D = length_D
        self._row_tokens = row_tokens
        self._batch_size = batch_size
        self._seed = seed
        self._blocks_per_epoch = -(-len(length_D) // _BLOCK)
        self._end = [0]  # how many batches the first blocks have together
        self._epoch: tuple[int, Rows] = (-1, length_D[:0])
        self._block: tuple[int, list[list[Rows]]] = (-1, [])

    def rows(self, step: int) -> list[Rows]:
        """Return, for the batch of a step (from 0), the document numbers of each row.

        How many batches a block has shows only when it is packed, so the first call packs all before it:
        0.05 s a block.
        """
        while self._end[-1] <= step:
            self._end.append(self._end[-1] + len(self._batches(len(self._end) - 1)))
        block = bisect.bisect_right(self._end, step) - 1
        return self._batches(block)[step - self._end[block]]

    def first_steps(self) -> Rows:
        """Return for each document the step of the first epoch that draws it, `[D]`."""
        step_D = np.empty(len(self._length_D), dtype=np.int64)
        batches = [batch for block in range(self._blocks_per_epoch) for batch in self._batches(block)]
        for step, batch in enumerate(batches):
            step_D[np.concatenate(batch)] = step
        return step_D

    def _batches(self, number: int) -> list[list[Rows]]:
        """Return the batches of a block, counted over all epochs."""
        if self._block[0] != number:
            epoch, block = divmod(number, self._blocks_per_epoch)
            members_U = self._shuffled(epoch)[block * _BLOCK : (block + 1) * _BLOCK]
            rows = [members_U[row] for row in first_fit(self._length_D[members_U], room=self._row_tokens)]
            # Fullest first: rows that are far from full meet in the last batch, which is the short one.
            rows.sort(key=lambda row: -int(self._length_D[row].sum()))
            batches = [rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size)]
            order = np.random.default_rng((self._seed, epoch, block)).permutation(len(batches))
            self._block = (number, [batches[i] for i in order])
        return self._block[1]

    def _shuffled(self, epoch: int) -> Rows:
        if self._epoch[0] != epoch:
            generator = np.random.default_rng((self._seed, epoch))
            self._epoch = (epoch, generator.permutation(len(self._length_D)))
        return self._epoch[1]


def first_fit(length_U: Rows, *, room: int) -> list[NDArray[np.int64]]:
    """Put each document, in order, into the first row with room for it; return each row's documents.

    Raises:
        WmtpError: A document is longer than a row.
    """
    if length_U.max() > room:
        raise WmtpError(f"a document of {length_U.max()} tokens does not fit into a row of {room}")
    left_R = np.full(len(length_U), room)
    row_U = np.empty(len(length_U), dtype=np.int64)
    used = 0
    for place, length in enumerate(length_U):  # each choice depends on those before
        row = int(np.argmax(left_R[: used + 1] >= length))
        left_R[row] -= length
        row_U[place] = row
        used = max(used, row + 1)
    by_row_U = np.argsort(row_U, kind="stable")
    return np.split(by_row_U, np.cumsum(np.bincount(row_U))[:-1])
