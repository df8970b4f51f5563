"""The global batch of every step of stage 2: a document a row, or packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen

from weighted_mtp_core.data.batches import CollatedBatch, Rows, Sampler, collate, collate_packed, pointwise
from weighted_mtp_core.data.packing import PackedSampler
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.recipe.schema import DataTable


@frozen(kw_only=True, eq=False)
class StepBatches:
    """Batches by step; any step can be asked for at any time.

    Attributes:
        tokens: What they are made of.
        order: What the batches depend on beside the tokens, as plain values.
    """

    tokens: TokenSet
    order: dict[str, int | str]
    _sampler: Sampler | PackedSampler
    _collate: Callable[[Any], CollatedBatch]

    def __call__(self, step: int) -> CollatedBatch:
        """Return the batch of a step (from 0)."""
        return self._collate(self._sampler.rows(step))

    def first_steps(self) -> Rows:
        """Return for each document the step of the first epoch that draws it, `[D]`."""
        return self._sampler.first_steps()


def make_step_batches(
    tokens: TokenSet, table: DataTable, *, batch_size: int, seed: int, device: torch.device
) -> StepBatches:
    """Return the batches that a recipe asks for.

    Raises:
        WmtpError: There is nothing to train on.
    """
    order: dict[str, int | str] = {
        "batch_size": batch_size,
        "seed": seed,
        "packing": table.packing,
        "device": device.type,
    }
    if table.packing == "documents":
        return StepBatches(
            tokens=tokens,
            order={**order, "pack_tokens": table.pack_tokens},
            sampler=PackedSampler(
                tokens.length_D, row_tokens=table.pack_tokens, batch_size=batch_size, seed=seed
            ),
            collate=lambda rows: collate_packed(tokens, rows, device=device),
        )
    return StepBatches(
        tokens=tokens,
        order=order,
        sampler=Sampler(pointwise(tokens), tokens.length_D, batch_size=batch_size, seed=seed),
        collate=lambda rows: collate(tokens, rows, device=device),
    )
