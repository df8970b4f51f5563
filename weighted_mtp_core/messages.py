"""Format text for messages: quoted names, "did you mean" suggestions, errors in one line, and commands."""

from __future__ import annotations

import difflib
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence


def quoted(names: Iterable[str]) -> str:
    """Return names in backticks, such as "`a`, `b`", in the given order."""
    return ", ".join(f"`{name}`" for name in names)


def nearest(word: str, names: Iterable[str], *, cutoff: float = 0.6) -> list[str]:
    """Return a list of the one name that is closest to `word`, or an empty list.

    The list is empty if no name has a similarity of at least `cutoff`; similarity is 0 to 1, and 1 for equal
    names.
    """
    return difflib.get_close_matches(word, list(names), n=1, cutoff=cutoff)


def suggest(names: Sequence[str]) -> str | None:
    """Return "did you mean `a`, `b` or `c`?", or None if there are no names."""
    if not names:
        return None
    *others, last = names
    return f"did you mean {quoted(others)} or `{last}`?" if others else f"did you mean `{last}`?"


def did_you_mean(word: str, names: Iterable[str]) -> str | None:
    """Return "did you mean `x`?" for the name that is closest to `word`, or None if no name is similar."""
    return suggest(nearest(word, names))


def reason(error: BaseException) -> str:
    """Return an error as text such as "ValueError: text", without the objects that attrs adds to errors."""
    text = error.args[0] if len(error.args) > 1 and isinstance(error.args[0], str) else str(error)
    return f"{type(error).__name__}: {text}"


def python_command(*arguments: str) -> str:
    """Return a command that can be pasted into a shell: `python -m` and the arguments, quoted.

    The command contains the path of the interpreter, unless `python` already runs this interpreter.
    """
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    return shlex.join([python, "-m", *arguments])
