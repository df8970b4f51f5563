"""Converts weights of spans of characters into weights of tokens.

Spans and tokens both cover characters (Unicode code points) of a text. A token of a byte-level tokenizer that
contains only a part of a character covers the whole character. The weight of a token is the mean of the
weights of its characters. So a token inside a span has the span's weight, and the weight of a token that
crosses the edge of a span is between the weights on both sides. Blanks count only in tokens that consist of
blanks, because the blank before a word usually belongs to the word's token but not to the span.

Shape letters: C characters, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from weighted_mtp_core.api.data import Span
from weighted_mtp_core.data.texts import Offsets
from weighted_mtp_core.errors import WmtpError

Floats = NDArray[np.float64]


def span_weights(
    text: str, spans: Sequence[Span], offsets: Offsets | None, *, count: int, name: str
) -> Floats:
    """Return the weights of a text's tokens, float64; tokens outside all spans have the weight 1.

    Args:
        text: The text.
        spans: The spans, which do not overlap.
        offsets: Start and end of each token, in characters; None if they are unknown.
        count: Number of tokens.
        name: The example's id, for messages.

    Raises:
        WmtpError: The offsets are unknown or their number is not `count`, or a character that is not a blank
            is covered by no token.
    """
    if offsets is None or len(offsets) != count:
        raise WmtpError(
            f"example `{name}` has weights of spans, but the tokenizer does not report which characters its "
            "tokens cover",
            hint="use a base model with a fast tokenizer (`tokenizer.json`), or one `weight` a row",
        )
    char_C = np.ones(len(text))
    for start, end, weight in spans:
        char_C[start:end] = weight
    inked_C = np.array([not char.isspace() for char in text])
    weight_L = np.empty(count)
    covered = 0
    for i, (start, end) in enumerate(offsets):  # a loop, as tokens may overlap and few documents have spans
        if inked_C[covered:start].any():
            raise _not_covered(name, text[covered:start])
        first = min(start, covered)  # blanks that no token covers belong to the next token
        covered = max(covered, end)
        own = slice(first, max(end, first + 1)) if first < len(text) else slice(len(text) - 1, len(text))
        chosen_C = char_C[own][inked_C[own]] if inked_C[own].any() else char_C[own]
        # The mean is clipped, so that rounding does not change the mean of equal numbers.
        weight_L[i] = np.clip(chosen_C.mean(), chosen_C.min(), chosen_C.max())
    if inked_C[covered:].any():
        raise _not_covered(name, text[covered:])
    return weight_L


def _not_covered(name: str, text: str) -> WmtpError:
    return WmtpError(
        f"example `{name}` has weights of spans, but the tokenizer reports no token for {text!r}",
        hint="use another base model, or one `weight` a row",
    )
