"""Computes weights of tokens from the weights of examples, messages and spans of characters in the data.

Shape letters: L tokens of one document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from weighted_mtp_core.data.documents import Document
from weighted_mtp_core.data.span_weights import span_weights
from weighted_mtp_core.data.texts import TextCodec


def given_weights(documents: Sequence[Document], codec: TextCodec) -> NDArray[np.float32]:
    """Return the weights of all tokens of the documents, concatenated, float32; 0 unless a token is a target.

    Args:
        documents: The documents.
        codec: The codec that encoded the documents.

    Raises:
        WmtpError: A response has weighted spans, but the codec does not report which characters its tokens
            cover, or a character of the response that is not a blank is covered by no token.
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
            weight_L[prompt:-1] *= span_weights(
                example.response,
                example.spans,
                codec.response_offsets(example.prompt, example.response),
                count=len(ids) - 1 - prompt,
                name=example.example_id,
            )
        weights.append(weight_L)
    return np.concatenate(weights, dtype=np.float32) if weights else np.zeros(0, dtype=np.float32)
