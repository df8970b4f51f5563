"""The line of every key of a TOML file, for error messages; tomli returns values without their lines."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import tomli

KeyPath = tuple[str | int, ...]
"""Keys and array indices from the top of a file: `("tracker", 0, "options", "experiment_prefix")`."""

_BRACKETS = ["".join(each) for depth in range(4) for each in itertools.product("]}", repeat=depth)]


@functools.cache
def find_lines(text: str) -> Mapping[KeyPath, int]:
    """Return the line number, from 1, of every table, key and array element of a valid TOML text.

    The function parses the first line, then the first two lines, and so on, and skips texts that are not
    valid TOML. The line of a key is the line after the longest valid text that does not contain the key.
    Brackets are added to close arrays and inline tables that continue on later lines.
    """
    rows = text.split("\n")
    lines: dict[KeyPath, int] = {}
    first = 1
    for last, brackets in itertools.product(range(1, len(rows) + 1), _BRACKETS):
        if last < first:
            continue  # already parsed with fewer brackets
        try:
            table = tomli.loads("\n".join([*rows[:last], brackets]))
        except tomli.TOMLDecodeError:
            continue
        lines = dict.fromkeys(key_paths(table), first) | lines
        first = last + 1
    return lines


def key_paths(value: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the path of every key and array element below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from key_paths(item, (*at, key))
