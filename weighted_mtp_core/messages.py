"""Words for messages: names in backticks, the near miss that was probably meant, an error in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def quoted(names: Iterable[str]) -> str:
    """Return "`a`, `b`", in the order given."""
    return ", ".join(f"`{name}`" for name in names)


def nearest(word: str, names: Iterable[str]) -> str | None:
    """Return the name closest to `word`, or None if none is close."""
    close = difflib.get_close_matches(word, list(names), n=1)
    return close[0] if close else None


def did_you_mean(word: str, names: Iterable[str]) -> str | None:
    """Return "did you mean `x`?" for the name closest to `word`, or None."""
    close = nearest(word, names)
    return f"did you mean `{close}`?" if close else None


def reason(error: BaseException) -> str:
    """Return "ValueError: text" for somebody else's error, without the objects that attrs adds."""
    text = error.args[0] if len(error.args) > 1 and isinstance(error.args[0], str) else str(error)
    return f"{type(error).__name__}: {text}"
