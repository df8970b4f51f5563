"""Padding overhead: computed tokens over real tokens, for the lengths of HumanEval and batch size 8.

    python benchmarks/padding.py

The results do not depend on the machine, because tokens are only counted. `shuffled` stands for a data loader
that shuffles documents and pads each batch to its longest row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from harness import Row, main, row
from humaneval_lengths import humaneval_tokens
from weighted_mtp_core.api import Batch
from weighted_mtp_core.data.batches import collate, collate_packed
from weighted_mtp_core.data.samplers import PackedSampler, Sampler, pointwise
from weighted_mtp_core.data.tokens import TokenSet

BATCH, ROW_TOKENS, VOCABULARY, EPOCHS = 8, 2048, 49152, 20


def share(batches: list[Batch]) -> float:
    """Return the number of tokens including padding over the number of tokens without padding."""
    computed = sum(batch.ids_BT.numel() for batch in batches)
    return computed / sum(int((batch.document_BT >= 0).sum()) for batch in batches)


def shuffled(tokens: TokenSet, seed: int) -> list[Batch]:
    """Return an epoch of batches of documents in random order."""
    order = np.random.default_rng(seed).permutation(len(tokens))
    return [collate(tokens, order[i : i + BATCH], device=_CPU) for i in range(0, len(order), BATCH)]


def grouped(tokens: TokenSet, seed: int) -> list[Batch]:
    """Return an epoch of batches of documents with similar lengths."""
    sampler = Sampler(pointwise(tokens), tokens.length_D, batch_size=BATCH, seed=seed)
    return [collate(tokens, sampler.rows(step), device=_CPU) for step in range(sampler.batches_per_epoch)]


def packed(tokens: TokenSet, seed: int) -> list[Batch]:
    """Return an epoch of batches in which a row may contain several documents."""
    sampler = PackedSampler(tokens.length_D, row_tokens=ROW_TOKENS, batch_size=BATCH, seed=seed)
    steps = int(sampler.first_steps().max()) + 1
    return [collate_packed(tokens, sampler.rows(step), device=_CPU) for step in range(steps)]


_CPU = torch.device("cpu")
_WAYS: dict[str, tuple[Callable[[TokenSet, int], list[Batch]], str]] = {
    "shuffled": (shuffled, ""),
    "grouped by length": (grouped, "<= 1.05"),
    f"packed at {ROW_TOKENS}": (packed, "<= 1.02"),
}


def measure(args: argparse.Namespace) -> list[Row]:
    """Measure the group with many seeds."""
    tokens = humaneval_tokens(VOCABULARY)
    lengths = tokens.length_D
    seeds = range(2 if args.quick else EPOCHS)
    note = f"mean {lengths.mean():.0f}, longest {lengths.max()} tokens"
    return [
        row(
            f"padding: computed over real tokens, {way}",
            [share(batches(tokens, seed)) for seed in seeds],
            limit=limit,
            unit="x",
            note=note,
        )
        for way, (batches, limit) in _WAYS.items()
    ]


if __name__ == "__main__":
    main(measure, __doc__)
