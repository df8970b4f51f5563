"""Determine the text of each token of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds; all these texts, concatenated, are the decoded sequence.

    A token that ends inside a character adds an empty text, unless it is the last token, and the token that
    completes the character adds the character.
    """
    texts, start, known = [], 0, ""
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[start:end])
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(known) :])
        start = end - 1  # one token of context, because some decoders drop a leading space
        known = _decode(tokenizer, ids[start:end])
        if known.endswith("\ufffd"):  # the token ends inside a character, so it cannot serve as context
            start, known = end, ""
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text
