"""Read files of records (JSON lines or parquet) for a data source, with every fault named by line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from weighted_mtp_core.errors import WmtpError

Record = Mapping[str, Any]
RowT = TypeVar("RowT")
_SHOWN = 20


def read_records(path: str | Path, parse: Callable[[Record], RowT]) -> list[RowT]:
    """Read a file of records: `.jsonl` or `.json` (one object a line), either gzipped, or `.parquet`.

    Args:
        path: The file; relative to where the program was started.
        parse: Makes a row of a record; a ValueError of it says what is wrong with the record.

    Raises:
        WmtpError: The file cannot be read or has no record, or lists its bad records (the first 20).
    """
    path = Path(path)
    rows: list[RowT] = []
    faults: list[str] = []
    try:
        for number, record in _records(path):
            try:
                rows.append(parse(_object(record)))
            except ValueError as error:
                faults.append(f"  record {number}: {error}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise WmtpError(f"cannot read `{path}`: {error}") from error
    refuse_faults(path, faults, what="record")
    if not rows:
        raise WmtpError(f"`{path}` has no records")
    return rows


def refuse_faults(path: Path, faults: Sequence[str], *, what: str) -> None:
    """Refuse a file with faults: list the first 20, indented lines, and count the others.

    Args:
        path: The file.
        faults: What is wrong, a text for each bad part of the file.
        what: Such a part: `line`, `record`.

    Raises:
        WmtpError: There are faults.
    """
    if faults:
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        count = f"1 bad {what}" if len(faults) == 1 else f"{len(faults)} bad {what}s"
        raise WmtpError(f"{path}: {count}\n" + "\n".join(faults[:_SHOWN]) + more)


def _records(path: Path) -> Iterator[tuple[int, object]]:
    """Yield each record with its number, from 1; text that is no JSON is yielded as text."""
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_records(path), start=1)
        return
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for number, line in enumerate(content.decode("utf-8").split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError:
                yield number, line


def _parquet_records(path: Path) -> Iterator[object]:
    from pyarrow import ArrowInvalid, parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise WmtpError(f"cannot read `{path}`: {error}") from error


def _object(record: object) -> Record:
    if isinstance(record, str):
        raise ValueError("not JSON")  # noqa: TRY004 - a fault of the file like any other
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")  # noqa: TRY004
    return record


def text(record: Record, key: str) -> str:
    """Return a text with Python's line ends; ValueError if there is none."""
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"`{key}` must be a string" if key in record else f"needs `{key}`, a string")  # noqa: TRY004
    return value.replace("\r\n", "\n").replace("\r", "\n")


def whole_number(record: Record, key: str) -> int:
    """Return a whole number; ValueError if there is none."""
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"needs `{key}`, a whole number")  # noqa: TRY004
    return value


def texts(record: Record, key: str) -> list[str]:
    """Return a list of texts with Python's line ends; ValueError if there is none."""
    value = record.get(key)
    if not isinstance(value, list) or any(not isinstance(each, str) for each in value):
        raise ValueError(f"needs `{key}`, a list of strings")
    return [each.replace("\r\n", "\n").replace("\r", "\n") for each in value]
