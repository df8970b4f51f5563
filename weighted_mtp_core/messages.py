"""Formats text for messages: names in backticks, "did you mean" suggestions, and errors in one line."""

from __future__ import annotations

import difflib
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence


def quoted(names: Iterable[str]) -> str:
    """Return "`a`, `b`", in the order given."""
    return ", ".join(f"`{name}`" for name in names)


def nearest(word: str, names: Iterable[str], *, cutoff: float = 0.6) -> list[str]:
    """Return the name closest to `word`; no name if none is at least `cutoff` alike, from 0 to 1 (equal)."""
    return difflib.get_close_matches(word, list(names), n=1, cutoff=cutoff)


def suggest(names: Sequence[str]) -> str | None:
    """Return "did you mean `a`, `b` or `c`?", or None if there are no names."""
    if not names:
        return None
    *others, last = names
    return f"did you mean {quoted(others)} or `{last}`?" if others else f"did you mean `{last}`?"


def did_you_mean(word: str, names: Iterable[str]) -> str | None:
    """Return "did you mean `x`?" for the name closest to `word`, or None if no name is close."""
    return suggest(nearest(word, names))


def reason(error: BaseException) -> str:
    """Return "ValueError: text" for an error of another library, without the objects that attrs adds."""
    text = error.args[0] if len(error.args) > 1 and isinstance(error.args[0], str) else str(error)
    return f"{type(error).__name__}: {text}"


def python_command(*arguments: str) -> str:
    """Return a command that can be pasted into a shell: `python -m` and the arguments, quoted.

    The command contains the path of the interpreter, unless `python` already runs this interpreter.
    """
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    return shlex.join([python, "-m", *arguments])
