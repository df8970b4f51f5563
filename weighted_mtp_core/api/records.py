"""Read files of records for a data source, and report every bad record of a file at once."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from weighted_mtp_core.errors import WmtpError

Record = Mapping[str, Any]
RowT = TypeVar("RowT")
_SHOWN = 20


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the lines of a UTF-8 file that are not empty, as text, with their numbers from 1.

    A file named `*.gz` is decompressed. Only a line feed ends a line, because texts contain other separators.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for number, line in enumerate(content.decode("utf-8").split("\n"), start=1):
        if line.strip():
            yield number, line


def read_records(
    path: str | Path,
    parse: Callable[[Record], RowT],
    *,
    what: str = "record",
    read: Callable[[Path], Iterable[tuple[int, object]]] = json_lines,
) -> list[RowT]:
    """Read a file of records: by default JSON lines, one object a line, gzipped (`*.gz`) or not.

    Args:
        path: The file; relative to where the program was started.
        parse: Makes a row of a record. A ValueError that it raises says what is wrong with the record.
        what: What messages call a record: `record`, `line`.
        read: Yields numbered records; a text among them is parsed as JSON. For files of another format.

    Raises:
        WmtpError: The file cannot be read or has no record, or lists its bad records (the first 20).
    """
    path = Path(path)
    rows: list[RowT] = []
    faults: list[str] = []
    try:
        for number, record in read(path):
            try:
                rows.append(parse(_object(record)))
            except ValueError as error:
                faults.append(f"  {what} {number}: {error}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WmtpError(f"cannot read `{path}`: {reason}") from error
    if faults:
        count = f"1 bad {what}" if len(faults) == 1 else f"{len(faults)} bad {what}s"
        more = [f"  and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise WmtpError("\n".join([f"{path}: {count}", *faults[:_SHOWN], *more]))
    if not rows:
        raise WmtpError(f"`{path}` has no {what}s")
    return rows


def _object(record: object) -> Record:
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")  # noqa: TRY004 - a fault of the file
    return record


def text_field(record: Record, key: str) -> str:
    """Return a text with Python's line ends; ValueError if there is none."""
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"`{key}` must be a string" if key in record else f"needs `{key}`, a string")  # noqa: TRY004
    return _newlines(value)


def int_field(record: Record, key: str) -> int:
    """Return a whole number; ValueError if there is none."""
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"needs `{key}`, a whole number")  # noqa: TRY004
    return value


def text_list_field(record: Record, key: str) -> list[str]:
    """Return a list of texts with Python's line ends; ValueError if there is none."""
    value = record.get(key)
    if not isinstance(value, list) or any(not isinstance(each, str) for each in value):
        raise ValueError(f"needs `{key}`, a list of strings")
    return [_newlines(each) for each in value]


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
