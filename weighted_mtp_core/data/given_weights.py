"""Converts weights that the data give to spans of characters into weights of tokens.

The positions of a span count the characters (code points) of the response, and each token covers some
characters. A token that contains only a part of a character, as with byte-level tokenizers, covers the whole
character. The blank before a word is usually part of the word's token but not of the span, so blanks count
only in tokens that consist of blanks. The weight of a token is the mean of the weights of its characters:
inside a span it is the weight of the span, and at the edge of a span a value in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from weighted_mtp_core.api import Example
from weighted_mtp_core.data.documents import Document
from weighted_mtp_core.data.texts import Offsets, TextCodec
from weighted_mtp_core.errors import WmtpError

Floats = NDArray[np.float64]


def given_weights(documents: Sequence[Document], codec: TextCodec) -> NDArray[np.float32]:
    """Return the weights of all tokens of documents, one after the other, float32; 0 on prompts.

    Args:
        documents: The documents.
        codec: The codec that made the ids.

    Raises:
        WmtpError: The codec does not report which characters the tokens of a response with spans cover.
    """
    weights = []
    for document in documents:
        example, prompt, ids = document.example, document.prompt, document.ids
        weight = 1.0 if example.weight is None else float(example.weight)
        weight_L = np.full(len(ids), weight)
        weight_L[:prompt] = 0.0
        if document.weights is not None:
            weight_L *= document.weights
        if example.spans:
            offsets = codec.response_offsets(example.prompt, example.response)
            weight_L[prompt:-1] *= _of_tokens(example, offsets, count=len(ids) - 1 - prompt)
        weights.append(weight_L)
    return np.concatenate(weights, dtype=np.float32) if weights else np.zeros(0, dtype=np.float32)


def _of_tokens(example: Example, offsets: Offsets | None, *, count: int) -> Floats:
    """Return the weights of a response's tokens, without EOS; tokens outside all spans have the weight 1."""
    text = example.response
    if offsets is None or len(offsets) != count:
        raise WmtpError(
            f"example `{example.example_id}` has weights of spans, but the tokenizer does not report which "
            "characters its tokens cover",
            hint="use a base model with a fast tokenizer (`tokenizer.json`), or one `weight` a row",
        )
    char_C = np.ones(len(text))
    for start, end, weight in example.spans or ():
        char_C[start:end] = weight
    inked_C = np.array([not char.isspace() for char in text])
    weight_L = np.empty(count)
    covered = 0
    for i, (start, end) in enumerate(offsets):  # a loop: tokens may overlap, and few documents have spans
        if inked_C[covered:start].any():
            raise _not_covered(example, covered, start)
        first = min(start, covered)  # blanks that no token covers belong to the next one
        covered = max(covered, end)
        own = slice(first, max(end, first + 1)) if first < len(text) else slice(len(text) - 1, len(text))
        chosen_C = char_C[own][inked_C[own]] if inked_C[own].any() else char_C[own]
        # Clipped, so that the mean of equal numbers is that number and not its neighbour.
        weight_L[i] = np.clip(chosen_C.mean(), chosen_C.min(), chosen_C.max())
    if inked_C[covered:].any():
        raise _not_covered(example, covered, len(text))
    return weight_L


def _not_covered(example: Example, start: int, end: int) -> WmtpError:
    return WmtpError(
        f"example `{example.example_id}` has weights of spans, but the tokenizer reports no token for "
        f"{example.response[start:end]!r}",
        hint="use another base model, or one `weight` a row",
    )
