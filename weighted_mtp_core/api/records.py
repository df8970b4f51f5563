"""Read files of records for a data source, and report all invalid records of a file in one error."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from attrs import define, field

from weighted_mtp_core.errors import WmtpError

Record = Mapping[str, Any]
RowT = TypeVar("RowT")
_SHOWN = 20
_TABLES = {".parquet", ".arrow"}


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the line number, counted from 1, and the text of each line that is not blank in a UTF-8 file.

    A file named `*.gz` is decompressed, and a byte order mark is dropped. Only a line feed ends a line,
    because strings may contain other line separators, such as U+2028. A byte that is not valid UTF-8 becomes
    a lone surrogate, which `read_records` reports with the line number.

    Raises:
        WmtpError: The file is UTF-16, or it begins with a JSON array or with an object that spans several
            lines.
        OSError, EOFError, zlib.error: The file cannot be read or decompressed.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise WmtpError(f"cannot read `{path}`: it is UTF-16", hint="save it as UTF-8")
    text = content.decode("utf-8-sig", errors="surrogateescape")
    if text.lstrip().startswith("[") or re.match(r'\s*\{\s*\n\s*"', text):
        raise WmtpError(
            f"`{path}` is JSON, but not one object per line",
            hint=f"jq -c 'if type == \"array\" then .[] else . end' {path} > lines.jsonl",
        )
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def table_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the number, counted from 1, and the record of each row of a parquet file or an Arrow stream.

    Each row of a table has all keys. A key without a value (null) is left out of the record, also in nested
    objects.

    Raises:
        WmtpError: The file is damaged, or has another format.
        OSError: The file cannot be read.
    """
    from pyarrow import ArrowException, ipc, parquet

    try:
        if path.suffix == ".parquet":
            batches = parquet.ParquetFile(path).iter_batches(batch_size=64)
        else:
            batches = ipc.open_stream(path)
        yield from enumerate((_without_nulls(row) for batch in batches for row in batch.to_pylist()), start=1)
    except (ArrowException, UnicodeDecodeError) as error:
        raise WmtpError(f"cannot read `{path}`: {error}") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def read_records(
    path: str | Path,
    parse: Callable[[Record], RowT],
    *,
    check: Callable[[RowT, str], None] | None = None,
) -> list[RowT]:
    """Read a file of records: `.parquet`, `.arrow` (a stream), or one JSON object per line, gzipped or not.

    Args:
        path: The file; a relative path starts at the current folder.
        parse: Converts a record to a row; raises ValueError with a message that says what is wrong.
        check: Called with each row and with its place, such as "`rows.jsonl` line 3". It can compare the row
            with earlier rows, as `ProblemIds` does, and must raise ValueError for an invalid row.

    Raises:
        WmtpError: The file cannot be read, has no records or has invalid records; the message lists the first
            20 invalid records.
    """
    path = Path(path)
    read, what = (table_rows, "row") if path.suffix in _TABLES else (json_lines, "line")
    rows: list[RowT] = []
    faults: list[str] = []
    try:
        for number, record in read(path):
            try:
                row = parse(_object(record))
                if check is not None:
                    check(row, f"`{path}` {what} {number}")
                rows.append(row)
            except ValueError as error:
                faults.append(f"  {what} {number}: {error}")
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WmtpError(f"cannot read `{path}`: {reason}") from error
    if faults:
        count = f"1 bad {what}" if len(faults) == 1 else f"{len(faults)} bad {what}s"
        more = [f"  and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise WmtpError("\n".join([f"{path}: {count}", *faults[:_SHOWN], *more]))
    if not rows:
        raise WmtpError(f"`{path}` has no {what}s")
    return rows


@define
class ProblemIds:
    """Records facts about the problem of each problem id, and refuses an id that two problems use.

    Use one `ProblemIds` object for all files of a data source.
    """

    _first: dict[tuple[str, str], tuple[Hashable, str]] = field(factory=dict, init=False)

    def add(self, problem_id: str, place: str, **facts: Hashable) -> None:
        """Compare facts about a problem with the facts from earlier records of the same problem.

        Args:
            problem_id: Id of the problem.
            place: Place of the record, as `read_records` passes it to `check`.
            facts: Properties that all records of a problem must have in common, such as `prompt`, `tests` or
                `split`; the value None means unknown.

        Raises:
            ValueError: A fact differs from the same fact in an earlier record of the problem; the message
                contains the place of that record.
        """
        for name, value in facts.items():
            first, where = self._first.setdefault((problem_id, name), (value, place))
            if value is not None and first is None:
                self._first[problem_id, name] = value, place
            elif value is not None and value != first:
                if name == "split":
                    fault = f"is in both `{first}` and `{value}`, first in {where}; give it to one split"
                else:
                    fault = f"has another `{name}` in {where}; give each problem an id of its own"
                raise ValueError(f"problem `{problem_id}` {fault}")

    def add_new(self, problem_id: str, place: str) -> None:
        """Register a problem that may have only one record.

        Raises:
            ValueError: Another record has registered the problem; the message contains the place of that
                record.
        """
        _, where = self._first.setdefault((problem_id, ""), (None, place))
        if where != place:
            raise ValueError(f"problem `{problem_id}` is already defined in {where}")


def _object(record: object) -> Record:
    if isinstance(record, str):
        record = _parsed(record)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")  # noqa: TRY004 - a fault of the file
    return record


def _parsed(line: str) -> object:
    """Parse a line; raises ValueError if the line is not UTF-8, is not JSON or has an unsupported value."""
    if not line.isascii():
        try:
            line.encode()
        except UnicodeEncodeError as error:
            byte = ord(line[error.start]) - 0xDC00
            raise ValueError(f"not UTF-8: byte 0x{byte:02x} at column {error.start + 1}") from error
    try:
        value: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply: make it flat") from error
    except ValueError as error:
        raise ValueError("contains an integer of more than 4300 digits: write it as a string") from error
    if "\\u" in line:
        _refuse_surrogates(value)
    return value


def _refuse_surrogates(value: object, key: str = "") -> None:
    """Raise ValueError for half a surrogate pair, which UTF-8 cannot encode and no tokenizer accepts."""
    if isinstance(value, dict):
        for name, each in value.items():
            _refuse_surrogates(name, name.encode("ascii", "backslashreplace").decode())
            _refuse_surrogates(each, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for number, each in enumerate(value):
            _refuse_surrogates(each, f"{key}[{number}]")
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise ValueError(
                f"`{key}` contains half a character, `{half}` without its pair: write the whole character"
            ) from error


def text_field(record: Record, key: str) -> str:
    """Return the string `record[key]`, with line feeds as line ends.

    Raises:
        ValueError: The value is missing or is not a string.
    """
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"`{key}` must be a string" if key in record else f"needs `{key}`, a string")  # noqa: TRY004
    return _newlines(value)


def int_field(record: Record, key: str) -> int:
    """Return the whole number `record[key]`.

    Raises:
        ValueError: The value is missing or is not a whole number.
    """
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"needs `{key}`, a whole number")  # noqa: TRY004
    return value


def text_list_field(record: Record, key: str) -> list[str]:
    """Return the list of strings `record[key]`, with line feeds as line ends.

    Raises:
        ValueError: The value is missing or is not a list of strings.
    """
    value = record.get(key)
    if not isinstance(value, list) or any(not isinstance(each, str) for each in value):
        raise ValueError(f"needs `{key}`, a list of strings")
    return [_newlines(each) for each in value]


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
