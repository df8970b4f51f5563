"""Makes the batch with the most tokens from the longest documents of the data.

If the documents of the data are not known, they are assumed to be as long as the recipe allows.

Shape letters: B rows, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray

from weighted_mtp_core.data.batches import CollatedBatch, collate, collate_packed
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.recipe.schema import DataTable

_HOST = torch.device("cpu")


@frozen(kw_only=True, eq=False)
class Documents:
    """Lengths of documents.

    Attributes:
        length_D: Number of tokens of each document, longest first, int64.
        prompt_D: Number of tokens of each document's prompt, in the same order, int64.
        measured: True for documents of the data, False for the longest document that the recipe allows.
    """

    length_D: NDArray[np.int64]
    prompt_D: NDArray[np.int64]
    measured: bool

    @classmethod
    def of(cls, tokens: TokenSet) -> Documents:
        """Return the documents of a token set."""
        order = np.argsort(-tokens.length_D, kind="stable")
        length_D, prompt_D = (
            np.asarray(each, np.int64)[order] for each in (tokens.length_D, tokens.prompt_D)
        )
        return cls(length_D=length_D, prompt_D=prompt_D, measured=True)

    @classmethod
    def longest(cls, table: DataTable) -> Documents:
        """Return one document of `data.max_tokens` tokens with a prompt of one token."""
        one = np.ones(1, np.int64)
        return cls(length_D=table.max_tokens * one, prompt_D=one, measured=False)

    def within(self, max_tokens: int) -> Documents:
        """Return the documents of at most `max_tokens` tokens; if all are longer, cut the longest one."""
        kept = self.length_D <= max_tokens
        if not kept.any():
            kept = np.arange(len(kept)) == 0
        length_D = self.length_D[kept].clip(max=max_tokens)
        return attrs.evolve(self, length_D=length_D, prompt_D=self.prompt_D[kept].clip(max=max_tokens - 1))

    @property
    def longest_prompt(self) -> int:
        """Number of tokens of the longest prompt; if prompts are unknown, of the longest document."""
        return int(max(self.prompt_D if self.measured else self.length_D))

    def batch(self, table: DataTable, *, rows: int, packed: bool) -> CollatedBatch:
        """Return a batch of the longest documents; documents are repeated if there are too few.

        Args:
            table: The recipe's `[data]`.
            rows: B, the number of rows.
            packed: Whether a row holds as many documents as fit if the recipe packs documents, as in stage 2;
                otherwise, a row holds one document.
        """
        per_row = self._fitting(table.pack_tokens) if packed and table.packing == "documents" else 1
        index_D = np.arange(rows * per_row) % len(self.length_D)
        tokens = _token_set(self.length_D[index_D], self.prompt_D[index_D])
        documents_BD = np.arange(rows * per_row).reshape(rows, per_row)
        if per_row == 1:
            return collate(tokens, documents_BD[:, 0], device=_HOST)
        return collate_packed(tokens, list(documents_BD), device=_HOST)

    def _fitting(self, row_tokens: int) -> int:
        return max(1, row_tokens // int(self.length_D[0]))


def _token_set(length_D: NDArray[np.int64], prompt_D: NDArray[np.int64]) -> TokenSet:
    names: Sequence[str] = [str(d) for d in range(len(length_D))]
    return TokenSet(
        ids_N=np.zeros(int(length_D.sum()), np.int32),
        start_D1=np.concatenate([[0], np.cumsum(length_D)]),
        prompt_D=prompt_D.astype(np.int32),
        reward_D=np.ones(len(length_D), np.float32),
        problem_D=np.arange(len(length_D)),
        example_ids=names,
    )
