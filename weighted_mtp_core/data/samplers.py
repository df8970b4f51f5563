"""Assigns documents to batches, with one document per row or with several documents packed into each row.

For given documents and settings, the batch of a step depends only on the seed and the step. So a checkpoint
has to save only the step, and the batches are the same for any number of processes.

Shape letters: D documents, U units (documents that stay together), R rows, N batches, S possible numbers of
missing units (units that batches lack to be full).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.errors import WmtpError

Rows = NDArray[np.int64]

# Number of batches in a group; the documents of a group are sorted by length. With documents as long as those
# of HumanEval, 1.05 tokens are computed per real token, padding included, and batches are still random.
_SORTED_BATCHES = 50

# Number of documents in a block; the documents of a block are packed together. With ten documents per row, a
# block has some 800 rows, so a few half-empty rows do not matter. Blocks are packed one by one, so an epoch
# starts as fast with a large corpus as with a small corpus.
_PACKED_DOCUMENTS = 8192


_GOLDEN = (5**0.5 - 1) / 2


class Sampler:
    """Endless batches of document numbers; the documents of a batch have similar lengths.

    Batches of short and of long documents take turns. If the documents of an epoch do not fill all batches,
    some batches of the last group of sorted batches get fewer rows, see `least_padding`.

    Args:
        units: `[U, r]` document numbers; the r documents of a unit stay in one batch (r = 2 for pairs).
        length_D: Number of tokens of each document.
        batch_size: Maximum number of rows of a global batch.
        seed: Seed of the order.

    Raises:
        WmtpError: There are no units, or a unit does not fit into a batch.
    """

    def __init__(self, units: Rows, length_D: Rows, *, batch_size: int, seed: int) -> None:
        if not len(units):
            raise WmtpError("the split `train` has no documents to train on")
        if batch_size < units.shape[1]:
            raise WmtpError(
                f"a batch of {batch_size} rows cannot hold {units.shape[1]} rows that belong together",
                hint="raise `batch_size`",
            )
        self._units = units
        self._length_U: Rows = length_D[units].max(axis=1)
        self._per_batch: int = batch_size // units.shape[1]
        self._seed = seed
        nothing = np.empty(0, dtype=np.int64)
        self._epoch: tuple[int, Rows, Rows, Rows] = (-1, nothing, nothing, nothing)

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches of an epoch, in which each unit appears once."""
        return -(-len(self._units) // self._per_batch)

    def rows(self, step: int) -> Rows:
        """Return the document numbers in the batch of a step, counted from 0."""
        epoch, position = divmod(step, self.batches_per_epoch)
        shuffled_U, order, start_N1 = self._shuffles(epoch)
        number = int(order[position])
        block = number // _SORTED_BATCHES * _SORTED_BATCHES * self._per_batch
        first, last = start_N1[number : number + 2] - block
        return self._units[self._sorted(shuffled_U, block)[first:last]].reshape(-1)

    def first_steps(self) -> Rows:
        """Return the step at which each document is used for the first time, int64 `[D]`.

        The units of the sampler must be single documents.
        """
        shuffled_U, order, start_N1 = self._shuffles(0)
        index_U = np.arange(len(shuffled_U))
        block_U = index_U // (_SORTED_BATCHES * self._per_batch)
        sorted_U = shuffled_U[np.lexsort((index_U, self._length_U[shuffled_U], block_U))]
        step_D = np.empty(len(shuffled_U), dtype=np.int64)
        batch_U = np.searchsorted(start_N1, index_U, side="right") - 1
        step_D[self._units[sorted_U, 0]] = np.argsort(order)[batch_U]
        return step_D

    def _sorted(self, shuffled_U: Rows, first: int) -> Rows:
        """Return the units of the group that begins at index `first`, in order of length."""
        members = shuffled_U[first : first + _SORTED_BATCHES * self._per_batch]
        return members[np.argsort(self._length_U[members], kind="stable")]

    def _shuffles(self, epoch: int) -> tuple[Rows, Rows, Rows]:
        """Return the order of an epoch's units, the order of its N batches, and the bounds of the batches.

        The bounds, `[N + 1]`, are indices into the order of the units.
        """
        if self._epoch[0] != epoch:
            generator = np.random.default_rng((self._seed, epoch))
            shuffled_U = generator.permutation(len(self._units))
            order = taking_turns(self.batches_per_epoch, generator)
            start_N1 = np.arange(self.batches_per_epoch + 1) * self._per_batch
            full = (self.batches_per_epoch - 1) // _SORTED_BATCHES * _SORTED_BATCHES
            last_U = self._sorted(shuffled_U, int(start_N1[full]))
            start_N1[full:] = start_N1[full] + least_padding(self._length_U[last_U], size=self._per_batch)
            self._epoch = (epoch, shuffled_U, order, start_N1)
        return self._epoch[1:]


def taking_turns(batches: int, generator: np.random.Generator) -> Rows:
    """Return a random order of an epoch's batches in which consecutive batches are spread over all lengths.

    An optimiser averages over about a dozen steps, and in a purely random order the batches of a dozen steps
    can be mostly short or mostly long. Consecutive multiples of the golden ratio, modulo 1, are spread evenly
    over [0, 1). So the multiple for a step determines the rank of its batch by length.

    Args:
        batches: N, the number of batches.
        generator: Draws the rank of the first batch, and the order of batches of equal rank.
    """
    order = generator.permutation(batches)
    block_N = order // _SORTED_BATCHES * _SORTED_BATCHES
    rank_N = (order - block_N) / np.minimum(batches - block_N, _SORTED_BATCHES)
    turn_N = (np.arange(batches) * _GOLDEN + generator.random()) % 1
    by_length: Rows = order[np.argsort(rank_N, kind="stable")]
    return by_length[np.argsort(np.argsort(turn_N))]


def least_padding(length_U: Rows, *, size: int) -> Rows:
    """Divide units into the fewest batches that can contain them, with as little padding as possible.

    The simplest division fills all batches except the last. But if a few units are much longer than the
    others, a small batch with only these units needs less padding. Dynamic programming over the batches and
    over the number of units that the batches so far lack to be full finds the optimum.

    Args:
        length_U: Number of tokens of each unit, ascending.
        size: Number of units in a full batch.

    Returns:
        int64 `[N + 1]`: the index of the first unit of each of the N batches, then the number of units.
    """
    batches = -(-len(length_U) // size)
    missing_S = np.arange(batches * size - len(length_U) + 1)  # units missing in the batches so far
    own_SS = missing_S[:, None] - missing_S  # units missing in the newest batch
    never = np.iinfo(np.int64).max // 2
    cost_S = np.where(missing_S == 0, 0, never)
    before: list[Rows] = []
    for batch in range(1, batches + 1):
        end_S = (batch * size - missing_S).clip(max=len(length_U))
        computed_SS = (size - own_SS) * length_U[end_S - 1][:, None]
        total_SS = np.where((own_SS >= 0) & (cost_S < never), cost_S + computed_SS, never)
        before.append(total_SS.argmin(axis=1))
        cost_S = total_SS.min(axis=1)
    missing = [int(missing_S[-1])]
    for choice_S in reversed(before):
        missing.append(int(choice_S[missing[-1]]))
    start_N1: Rows = np.arange(batches + 1) * size - np.asarray(missing[::-1])
    return start_N1


class PackedSampler:
    """Endless batches of rows with several documents in each row.

    The documents of an epoch are shuffled and packed block by block. The rows of a block are sorted by their
    number of tokens and divided into batches, and the batches are shuffled. One batch of a block may be
    smaller than the other batches.

    Args:
        length_D: Number of tokens of each document.
        row_tokens: Maximum length of a row in tokens.
        batch_size: Maximum number of rows of a global batch.
        seed: Seed of the order.

    Raises:
        WmtpError: There is no document.
    """

    def __init__(self, length_D: Rows, *, row_tokens: int, batch_size: int, seed: int) -> None:
        if not len(length_D):
            raise WmtpError("the split `train` has no documents to train on")
        self._length_D = length_D
        self._row_tokens = row_tokens
        self._batch_size = batch_size
        self._seed = seed
        self._blocks_per_epoch = -(-len(length_D) // _PACKED_DOCUMENTS)
        self._end = [0]  # element i: number of batches in the first i blocks
        self._epoch: tuple[int, Rows] = (-1, length_D[:0])
        self._block: tuple[int, list[list[Rows]]] = (-1, [])

    @property
    def batches_per_epoch(self) -> float:
        """Number of batches of an epoch, estimated from the first block if there are several blocks."""
        return len(self._batches(0)) * len(self._length_D) / min(len(self._length_D), _PACKED_DOCUMENTS)

    def rows(self, step: int) -> list[Rows]:
        """Return the document numbers of each row in the batch of a step, counted from 0.

        The number of batches in a block is known only after packing. So a resumed run packs all earlier
        blocks at its first call, which takes 0.05 s per block.
        """
        while self._end[-1] <= step:
            self._end.append(self._end[-1] + len(self._batches(len(self._end) - 1)))
        block = bisect.bisect_right(self._end, step) - 1
        return self._batches(block)[step - self._end[block]]

    def first_steps(self) -> Rows:
        """Return the step at which each document is used for the first time, int64 `[D]`."""
        step_D = np.empty(len(self._length_D), dtype=np.int64)
        batches = [batch for block in range(self._blocks_per_epoch) for batch in self._batches(block)]
        for step, batch in enumerate(batches):
            step_D[np.concatenate(batch)] = step
        return step_D

    def _batches(self, number: int) -> list[list[Rows]]:
        """Return the batches of a block; blocks are numbered across epochs."""
        if self._block[0] != number:
            epoch, block = divmod(number, self._blocks_per_epoch)
            members_U = self._shuffled(epoch)[block * _PACKED_DOCUMENTS : (block + 1) * _PACKED_DOCUMENTS]
            rows = [
                members_U[row] for row in first_fit(self._length_D[members_U], row_tokens=self._row_tokens)
            ]
            # The fullest rows come first, so that the emptiest rows are in the last batch, which may have
            # fewer rows than the others.
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


def first_fit(length_U: Rows, *, row_tokens: int) -> list[NDArray[np.int64]]:
    """Put each document, in order, into the first row with enough space; return the documents of each row.

    Raises:
        WmtpError: A document is longer than a row.
    """
    if length_U.max() > row_tokens:
        raise WmtpError(f"a document of {length_U.max()} tokens does not fit into a row of {row_tokens}")
    left_R = np.full(len(length_U), row_tokens)
    row_U = np.empty(len(length_U), dtype=np.int64)
    used = 0
    for document, length in enumerate(length_U):  # each choice depends on the earlier choices
        row = int(np.argmax(left_R[: used + 1] >= length))
        left_R[row] -= length
        row_U[document] = row
        used = max(used, row + 1)
    by_row_U = np.argsort(row_U, kind="stable")
    return np.split(by_row_U, np.cumsum(np.bincount(row_U))[:-1])


def pointwise(token_set: TokenSet) -> Rows:
    """Return units of one document each, `[D, 1]`."""
    return np.arange(len(token_set), dtype=np.int64)[:, None]


def evenly_spread(rows: Rows, *, limit: int) -> Rows:
    """Return at most `limit` of the document numbers `rows`, evenly spread; all of them if `limit` is 0."""
    count = min(limit, len(rows)) if limit else len(rows)
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def in_order(token_set: TokenSet, rows: Rows, *, batch_size: int) -> Iterator[Rows]:
    """Yield the document numbers `rows`, each once, in batches of documents of similar length."""
    rows = rows[np.argsort(token_set.lengths(rows), kind="stable")]
    for first in range(0, len(rows), batch_size):
        yield rows[first : first + batch_size]
