"""Print rows in aligned columns without colour, so that a terminal, a pipe and a log get the same text."""

from __future__ import annotations

from collections.abc import Sequence


def print_rows(rows: Sequence[tuple[str, ...]], *, indent: str = "") -> None:
    """Print rows with each column padded to its widest cell, except the last cell of a row."""
    widths: dict[int, int] = {}
    for row in rows:
        for column, cell in enumerate(row[:-1]):
            widths[column] = max(widths.get(column, 0), len(cell))
    for row in rows:
        *front, last = row
        cells = [cell.ljust(widths[column]) for column, cell in enumerate(front)]
        print((indent + "  ".join([*cells, last])).rstrip())
