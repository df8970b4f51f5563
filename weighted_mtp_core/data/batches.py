"""Make batches of tensors, with one document per row or with several documents packed into each row.

Shape letters: B rows, T positions, D documents, N tokens of all documents of the batch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import attrs
import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray

from weighted_mtp_core.api import Batch
from weighted_mtp_core.data.array_files import drop_pages
from weighted_mtp_core.data.samplers import PackedSampler, Rows, Sampler, pointwise
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.recipe.schema import DataTable
from weighted_mtp_core.runtime.device import to_device

BatchT = TypeVar("BatchT", bound=Batch)


@frozen(kw_only=True, eq=False)
class CollatedBatch(Batch):
    """A batch made from a token set, with more data about its tokens and documents in main memory.

    Attributes:
        token_BT: int64 index of each token in `TokenSet.ids_N`; -1 on padding.
        preceding_BT: int64 number of tokens that precede a response token in its document; 0 for tokens that
            are not response tokens. A token is a target of head k if its `preceding_BT` is at least k.
        length_BD: int64 number of tokens of each document, row by row.
        names: The example id of each document, row by row.
        metadata: The metadata of each document, row by row.
    """

    token_BT: Rows
    preceding_BT: Rows
    length_BD: tuple[Rows, ...]
    names: tuple[tuple[str, ...], ...]
    metadata: tuple[tuple[Mapping[str, str | float], ...], ...]

    def target_positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows and columns of the targets of head 1; see `Batch.target_positions`."""
        row_N, column_N = (self.preceding_BT >= 1).nonzero()
        return to_device(row_N, self.ids_BT.device), to_device(column_N, self.ids_BT.device)


def preceding(batch: Batch) -> Rows | None:
    """Return `CollatedBatch.preceding_BT`, or None for a batch of another class."""
    return batch.preceding_BT if isinstance(batch, CollatedBatch) else None


def collate(token_set: TokenSet, rows: Sequence[int] | Rows, *, device: torch.device) -> CollatedBatch:
    """Return the documents with the numbers `rows` as a right-padded batch with one document per row."""
    batch, _ = _lay_out(token_set, np.asarray(rows)[:, None], device=device)
    return batch


def collate_packed(token_set: TokenSet, rows: Sequence[Rows], *, device: torch.device) -> CollatedBatch:
    """Return a right-padded batch with several documents per row.

    `rows` contains, for each row, the numbers of the row's documents.
    """
    batch, position_BT = _lay_out(token_set, rows, device=device)
    return attrs.evolve(batch, position_BT=position_BT)


def _lay_out(
    token_set: TokenSet, rows: Sequence[Rows] | Rows, *, device: torch.device
) -> tuple[CollatedBatch, torch.Tensor]:
    """Return a batch, and each token's position in its document, int64 `[B, T]`.

    Args:
        token_set: The documents.
        rows: The numbers of the documents in each row.
        device: The device of the tensors.
    """
    documents = np.concatenate(rows)
    count_B = np.asarray([len(row) for row in rows])
    first_D = np.repeat(np.cumsum(count_B) - count_B, count_B)  # index of the first document in the same row
    number_D = np.arange(len(documents)) - first_D
    length_D = token_set.lengths(documents)
    start_D = np.cumsum(length_D) - length_D
    offset_D = start_D - start_D[first_D]
    row_D = np.repeat(np.arange(len(rows)), count_B)
    shape = len(rows), int((offset_D + length_D).max())
    position_N = np.arange(length_D.sum()) - np.repeat(start_D, length_D)
    index_N = np.repeat(row_D * shape[1] + offset_D, length_D) + position_N
    token_N = np.repeat(token_set.start_D1[documents], length_D) + position_N
    ids_N = token_set.ids_N[token_N]
    drop_pages(token_set.ids_N)
    response_N = position_N >= np.repeat(token_set.prompt_D[documents], length_D)
    if token_set.target_N is not None:
        response_N = token_set.target_N[token_N]
        drop_pages(token_set.target_N)
    _, group_D = np.unique(token_set.problem_D[documents], return_inverse=True)

    def padded(value_N: NDArray[Any], dtype: type[np.generic], *, padding: int = 0) -> NDArray[Any]:
        value_BT = np.full(shape, padding, dtype=dtype)
        value_BT.reshape(-1)[index_N] = value_N
        return value_BT

    def tensor(value_N: NDArray[Any], dtype: type[np.generic], *, padding: int = 0) -> torch.Tensor:
        return to_device(padded(value_N, dtype, padding=padding), device)

    names = tuple(tuple(token_set.example_ids[int(d)] for d in row) for row in rows)
    given_BT = problem_BT = None
    if token_set.problem_hash_D is not None:
        problem_BT = tensor(np.repeat(token_set.problem_hash_D[documents], length_D), np.int64)
    if token_set.given_N is not None:
        given_BT = tensor(token_set.given_N[token_N], np.float32)
        drop_pages(token_set.given_N)
    batch = CollatedBatch(
        ids_BT=tensor(ids_N, np.int64),
        document_BT=tensor(np.repeat(number_D, length_D), np.int64, padding=-1),
        response_BT=tensor(response_N, np.bool_),
        reward_BT=tensor(np.repeat(token_set.reward_D[documents], length_D) * response_N, np.float32),
        group_BT=tensor(np.repeat(group_D, length_D), np.int64, padding=-1),
        given_BT=given_BT,
        problem_BT=problem_BT,
        example_ids=tuple(map(" + ".join, names)),
        names=names,
        metadata=tuple(tuple(_metadata(token_set, int(d)) for d in row) for row in rows),
        token_BT=padded(token_N, np.int64, padding=-1),
        preceding_BT=padded(position_N * response_N, np.int64),
        length_BD=tuple(np.split(length_D, np.cumsum(count_B)[:-1])),
    )
    return batch, tensor(position_N, np.int64)


def _metadata(token_set: TokenSet, document: int) -> Mapping[str, str | float]:
    text = token_set.metadata[document] if len(token_set.metadata) else ""
    metadata: dict[str, str | float] = json.loads(text) if text else {}
    return metadata


def split_rows(batch: BatchT, parts: int, *, together: int = 1) -> Iterator[BatchT]:
    """Yield up to `parts` micro-batches of nearly equal size, each with a multiple of `together` rows."""
    count = len(batch.ids_BT) // together
    bounds = together * np.linspace(0, count, min(parts, count) + 1).round().astype(int)
    by_row = {each.name: getattr(batch, each.name) for each in attrs.fields(type(batch))}
    for first, last in itertools.pairwise(bounds):
        part = {name: value[first:last] for name, value in by_row.items() if value is not None}
        yield attrs.evolve(batch, **part)


class StepBatches:
    """Computes the global batch of any step of stage 2; steps can be requested in any order.

    Args:
        tokens: The documents.
        table: The recipe's `[data]`.
        batch_size: Maximum number of rows of a global batch.
        seed: Seed of the order.
        device: Device of the batches.

    Attributes:
        tokens: The documents.
        order: All settings that affect the batches, except the documents, as plain values.

    Raises:
        WmtpError: There are no documents.
    """

    def __init__(
        self, tokens: TokenSet, table: DataTable, *, batch_size: int, seed: int, device: torch.device
    ) -> None:
        self.tokens = tokens
        self.order: dict[str, int | str] = {
            "batch_size": batch_size,
            "seed": seed,
            "packing": table.packing,
            "device": device.type,
        }
        self._sampler: Sampler | PackedSampler
        self._collate: Callable[..., CollatedBatch]
        length_D, size = tokens.length_D, table.pack_tokens
        if table.packing == "documents":
            self.order["pack_tokens"] = size
            self._sampler = PackedSampler(length_D, row_tokens=size, batch_size=batch_size, seed=seed)
            self._collate = partial(collate_packed, tokens, device=device)
        else:
            self._sampler = Sampler(pointwise(tokens), length_D, batch_size=batch_size, seed=seed)
            self._collate = partial(collate, tokens, device=device)

    @property
    def batches_per_epoch(self) -> float:
        """The number of batches in an epoch; it may be an estimate if documents are packed."""
        return self._sampler.batches_per_epoch

    def __call__(self, step: int) -> CollatedBatch:
        """Return the batch of a step, counted from 0."""
        return self._collate(self._sampler.rows(step))

    def pairs_per_step(self, n_future: int) -> tuple[float, ...]:
        """Return each head's mean number of pairs per step of an epoch; `align_labels` defines the pairs."""
        tokens, target_N = self.tokens, self.tokens.target_N
        count, pairs = int(tokens.response_D.sum()), []
        for index in range(n_future):  # head k predicts the targets after the first k tokens of a document
            long_D = tokens.length_D > index
            if target_N is None:
                count -= int((tokens.prompt_D[long_D] <= index).sum())
            else:
                count -= int(target_N[tokens.start_D1[:-1][long_D] + index].sum())
            pairs.append(count / self.batches_per_epoch)
        return tuple(pairs)

    def first_steps(self) -> Rows:
        """Return the step at which each document is used for the first time, int64 `[D]`."""
        return self._sampler.first_steps()
