"""Which documents are in which batch, and the batch as tensors.

The order is a pure function of (seed, epoch, position): nothing but the step needs saving, and every number
of processes that divides the batch sees the same documents in the same order.

Shape letters: B rows, T positions, D documents, N tokens of the batch's documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import attrs
import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray

from weighted_mtp_core.api import Batch
from weighted_mtp_core.data.arrays import drop_pages
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.errors import WmtpError

Rows = NDArray[np.int64]
BatchT = TypeVar("BatchT", bound=Batch)

# Lengths are sorted within this many batches: enough for 1.05 computed over real tokens on HumanEval's
# lengths, few enough that batches stay random.
_SORTED_BATCHES = 50


@frozen(kw_only=True, eq=False)
class CollatedBatch(Batch):
    """A batch made of a token set, with facts that the host would otherwise wait for the device to read.

    Attributes:
        token_BT: int64, index of each token in `TokenSet.ids_N`; -1 on padding.
        preceding_BT: int64, for each response token the number of tokens that precede it in its document; 0
            elsewhere. Where it is at least k, the token is a target of head k.
    """

    token_BT: Rows
    preceding_BT: Rows

    def target_positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows and columns of the targets of head 1; see `Batch`."""
        row_N, column_N = (
            torch.from_numpy(each).to(self.ids_BT.device, non_blocking=True)
            for each in (self.preceding_BT >= 1).nonzero()
        )
        return row_N, column_N


def preceding(batch: Batch) -> Rows | None:
    """Return `CollatedBatch.preceding_BT`, or None for a batch made elsewhere."""
    return batch.preceding_BT if isinstance(batch, CollatedBatch) else None


class Sampler:
    """Endless batches of document numbers, grouped by length.

    Where the documents do not fill an epoch's last batch, the batches that are sorted together with it share
    the rows that are missing, each where it saves most padding.

    Args:
        units: `[U, r]` document numbers; the r documents of a unit stay together (a pair: r = 2).
        length_D: Tokens of each document.
        batch_size: Rows of the global batch.
        seed: Of the order.

    Raises:
        WmtpError: There is no unit, or a batch cannot hold one.
    """

    def __init__(self, units: Rows, length_D: Rows, *, batch_size: int, seed: int) -> None:
        if not len(units):
            raise WmtpError("there is nothing to train on in the split `train`")
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
        """Batches that together hold every unit once."""
        return -(-len(self._units) // self._per_batch)

    def rows(self, step: int) -> Rows:
        """Return the document numbers of the batch of a step (from 0)."""
        epoch, position = divmod(step, self.batches_per_epoch)
        shuffled_U, order, start_N1 = self._shuffles(epoch)
        number = int(order[position])
        block = number // _SORTED_BATCHES * _SORTED_BATCHES * self._per_batch
        first, last = start_N1[number : number + 2] - block
        return self._units[self._sorted(shuffled_U, block)[first:last]].reshape(-1)

    def first_steps(self) -> Rows:
        """Return for each document the step of the first epoch that draws it, `[D]`; units of one only."""
        shuffled_U, order, start_N1 = self._shuffles(0)
        place_U = np.arange(len(shuffled_U))
        block_U = place_U // (_SORTED_BATCHES * self._per_batch)
        sorted_U = shuffled_U[np.lexsort((place_U, self._length_U[shuffled_U], block_U))]
        step_D = np.empty(len(shuffled_U), dtype=np.int64)
        batch_U = np.searchsorted(start_N1, place_U, side="right") - 1
        step_D[self._units[sorted_U, 0]] = np.argsort(order)[batch_U]
        return step_D

    def _sorted(self, shuffled_U: Rows, first: int) -> Rows:
        """Return the units that are sorted together, which begin at `first`, by length."""
        members = shuffled_U[first : first + _SORTED_BATCHES * self._per_batch]
        return members[np.argsort(self._length_U[members], kind="stable")]

    def _shuffles(self, epoch: int) -> tuple[Rows, Rows, Rows]:
        """Return the order of an epoch's units, that of its N batches, and where each begins, `[N + 1]`."""
        if self._epoch[0] != epoch:
            generator = np.random.default_rng((self._seed, epoch))
            shuffled_U = generator.permutation(len(self._units))
            order = generator.permutation(self.batches_per_epoch)
            start_N1 = np.arange(self.batches_per_epoch + 1) * self._per_batch
            full = (self.batches_per_epoch - 1) // _SORTED_BATCHES * _SORTED_BATCHES
            last_U = self._sorted(shuffled_U, int(start_N1[full]))
            start_N1[full:] = start_N1[full] + least_padding(self._length_U[last_U], size=self._per_batch)
            self._epoch = (epoch, shuffled_U, order, start_N1)
        return self._epoch[1:]


def least_padding(length_U: Rows, *, size: int) -> Rows:
    """Cut units into as few batches as can hold them, so that padding them takes the fewest tokens.

    Only the last batch need be short; but a batch whose longest units are far longer than the others costs
    less if those stand alone. Found exactly, one batch after the other, over how many rows those so far lack.

    Args:
        length_U: Tokens of each unit, ascending.
        size: Units of a full batch.

    Returns:
        Where each of the N batches begins, and the end, int64 `[N + 1]`.
    """
    batches = -(-len(length_U) // size)
    lacking_S = np.arange(batches * size - len(length_U) + 1)  # rows that the batches so far lack
    own_SS = lacking_S[:, None] - lacking_S  # and the newest alone, by those before it
    never = np.iinfo(np.int64).max // 2
    cost_S = np.where(lacking_S == 0, 0, never)
    before: list[Rows] = []
    for batch in range(1, batches + 1):
        end_S = (batch * size - lacking_S).clip(max=len(length_U))
        computed_SS = (size - own_SS) * length_U[end_S - 1][:, None]
        total_SS = np.where((own_SS >= 0) & (cost_S < never), cost_S + computed_SS, never)
        before.append(total_SS.argmin(axis=1))
        cost_S = total_SS.min(axis=1)
    lacking = [int(lacking_S[-1])]
    for choice_S in reversed(before):
        lacking.append(int(choice_S[lacking[-1]]))
    start_N1: Rows = np.arange(batches + 1) * size - np.asarray(lacking[::-1])
    return start_N1


def pointwise(token_set: TokenSet) -> Rows:
    """Return every document as a unit of its own, `[D, 1]`."""
    return np.arange(len(token_set), dtype=np.int64)[:, None]


def collate(token_set: TokenSet, rows: Sequence[int] | Rows, *, device: torch.device) -> CollatedBatch:
    """Return the documents as a right-padded batch, one document a row."""
    rows = np.asarray(rows)
    nothing = np.zeros_like(rows)
    batch, _ = _lay(
        token_set, rows, row_D=np.arange(len(rows)), offset_D=nothing, number_D=nothing, device=device
    )
    return batch


def collate_packed(token_set: TokenSet, rows: Sequence[Rows], *, device: torch.device) -> CollatedBatch:
    """Return the documents as a right-padded batch, each row's documents one after the other."""
    ends = [np.cumsum(token_set.lengths(row)) for row in rows]
    batch, position_BT = _lay(
        token_set,
        np.concatenate(rows),
        row_D=np.repeat(np.arange(len(rows)), [len(row) for row in rows]),
        offset_D=np.concatenate([np.concatenate([[0], end[:-1]]) for end in ends]),
        number_D=np.concatenate([np.arange(len(row)) for row in rows]),
        device=device,
    )
    names = tuple(" + ".join(token_set.example_ids[int(d)] for d in row) for row in rows)
    return attrs.evolve(batch, position_BT=position_BT, example_ids=names)


def _lay(
    token_set: TokenSet, documents: Rows, *, row_D: Rows, offset_D: Rows, number_D: Rows, device: torch.device
) -> tuple[CollatedBatch, torch.Tensor]:
    """Lay documents into rows.

    Args:
        token_set: Where they are.
        documents: Their numbers, `[D]`.
        row_D: Which row each goes into.
        offset_D: Where in the row it begins.
        number_D: The how manieth of its row it is.
        device: Of the tensors.

    Returns:
        The batch, with a name for each document, and int64 `[B, T]` positions within documents.
    """
    length_D = token_set.lengths(documents)
    shape = int(row_D.max()) + 1, int((offset_D + length_D).max())
    position_N = np.arange(length_D.sum()) - np.repeat(np.cumsum(length_D) - length_D, length_D)
    place_N = np.repeat(row_D * shape[1] + offset_D, length_D) + position_N
    source_N = np.repeat(token_set.start_D1[documents], length_D) + position_N
    ids_N = token_set.ids_N[source_N]
    drop_pages(token_set.ids_N)
    response_N = position_N >= np.repeat(token_set.prompt_D[documents], length_D)
    _, group_D = np.unique(token_set.problem_D[documents], return_inverse=True)

    def laid(value_N: NDArray[Any], dtype: type[np.generic], *, padding: int = 0) -> NDArray[Any]:
        laid_BT = np.full(shape, padding, dtype=dtype)
        laid_BT.reshape(-1)[place_N] = value_N
        return laid_BT

    def tensor(value_N: NDArray[Any], dtype: type[np.generic], *, padding: int = 0) -> torch.Tensor:
        return torch.from_numpy(laid(value_N, dtype, padding=padding)).to(device, non_blocking=True)

    batch = CollatedBatch(
        ids_BT=tensor(ids_N, np.int64),
        document_BT=tensor(np.repeat(number_D, length_D), np.int64, padding=-1),
        response_BT=tensor(response_N, np.bool_),
        reward_BT=tensor(np.repeat(token_set.reward_D[documents], length_D) * response_N, np.float32),
        group_BT=tensor(np.repeat(group_D, length_D), np.int64, padding=-1),
        example_ids=tuple(token_set.example_ids[int(d)] for d in documents),
        token_BT=laid(source_N, np.int64, padding=-1),
        preceding_BT=laid(position_N * response_N, np.int64),
    )
    return batch, tensor(position_N, np.int64)


def split_rows(batch: BatchT, parts: int, *, together: int = 1) -> Iterator[BatchT]:
    """Yield the batch in up to `parts` runs of rows of nearly equal size, never cutting `together` rows."""
    count = len(batch.ids_BT) // together
    bounds = together * np.linspace(0, count, min(parts, count) + 1).round().astype(int)
    by_row = {each.name: getattr(batch, each.name) for each in attrs.fields(type(batch))}
    for first, last in itertools.pairwise(bounds):
        part = {name: value[first:last] for name, value in by_row.items() if value is not None}
        yield attrs.evolve(batch, **part)


def in_order(token_set: TokenSet, *, batch_size: int, limit: int = 0) -> Iterator[Rows]:
    """Yield document numbers in batches of similar length, each document once; `limit` 0 means all.

    A limit takes documents evenly spread over the set, so that it is a sample and not its beginning.
    """
    count = min(limit, len(token_set)) if limit else len(token_set)
    chosen = np.linspace(0, len(token_set) - 1, count).round().astype(np.int64)
    chosen = chosen[np.argsort(token_set.lengths(chosen), kind="stable")]
    for first in range(0, count, batch_size):
        yield chosen[first : first + batch_size]
