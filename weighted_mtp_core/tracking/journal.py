"""The journal `metrics.jsonl` of a run: one JSON object per line, written before trackers receive the data.

A line has the form `{"kind": ..., <fields>, "time": <seconds since 1970>, "crc": "<8 hex digits>"}`. The
checksum `crc` covers all other keys except `time`, so the lines of the kind `metrics` of two runs with equal
results differ only in `time`.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from attrs import define, field, frozen

from weighted_mtp_core.errors import RunFailedError

_TIME = b',"time":'


@frozen(kw_only=True)
class Entry:
    """One line of the journal.

    Attributes:
        kind: `run`, `params`, `tags`, `datasets`, `metrics`, `timings`, `artifact` or `status`.
        fields: All keys of the line except kind, time and checksum.
        time_ms: Time of the event, in milliseconds since 1970.
        start: Byte position of the line in the file.
        end: Byte position of the next line.
    """

    kind: str
    fields: Mapping[str, Any]
    time_ms: int
    start: int
    end: int


@frozen(kw_only=True)
class Damage:
    """A complete line that is malformed or has a wrong checksum, at the bytes from `start` to `end`."""

    start: int
    end: int


def encode(kind: str, fields: Mapping[str, Any], *, time_ms: int) -> bytes:
    """Return one line of the journal; all numbers must be finite, or converted by `plain_number`."""
    body = orjson.dumps({"kind": kind, **fields})
    seconds, milliseconds = divmod(time_ms, 1000)
    return b'%s,"time":%d.%03d,"crc":"%08x"}\n' % (body[:-1], seconds, milliseconds, zlib.crc32(body))


def decode(line: bytes, *, start: int) -> Entry | Damage:
    """Parse one line of the journal, which begins at byte `start`, and verify its checksum."""
    end = start + len(line)
    body = line[: line.rfind(_TIME)] + b"}"
    try:
        fields = json.loads(line)
        if fields.pop("crc") != f"{zlib.crc32(body):08x}":
            return Damage(start=start, end=end)
        time_ms = round(fields.pop("time") * 1000)
        return Entry(kind=fields.pop("kind"), fields=fields, time_ms=time_ms, start=start, end=end)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Damage(start=start, end=end)


def plain_number(value: float) -> float | str:
    """Return a finite number unchanged, and other numbers as `"nan"`, `"inf"` or `"-inf"`.

    JSON cannot store numbers that are not finite. Such numbers are kept in the journal, but not sent to
    trackers.
    """
    return value if math.isfinite(value) else str(value)


def read_journal(path: Path, start: int = 0, *, kinds: Sequence[str] = ()) -> Iterator[Entry | Damage]:
    """Yield the complete lines of a journal from the byte position `start` on.

    An incomplete last line is left out. With `kinds`, only lines of these kinds are parsed and yielded.
    """
    wanted = tuple(f'{{"kind":"{kind}"'.encode() for kind in kinds) or (b"",)
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            if line.startswith(wanted):
                yield decode(line, start=start)
            start += len(line)


def last_entry(path: Path) -> Entry | None:
    """Return the last undamaged line of a journal, or None if there is no such line."""
    last = None
    for line in read_journal(path):
        if isinstance(line, Entry):
            last = line
    return last


def now_ms() -> int:
    """Return the current time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def _open_whole(path: Path) -> int:
    """Open a journal for appending, and remove an incomplete last line that a killed process has left."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    size = os.fstat(descriptor).st_size
    keep = size
    while keep and os.pread(descriptor, 1, keep - 1) != b"\n":
        keep -= 1
    if keep != size:
        os.ftruncate(descriptor, keep)
    return descriptor


@define(eq=False)
class Journal:
    """Appends lines to a journal; any thread may append.

    After `append` has returned, the line is not lost even if the process is killed. A line that
    `Outbox.step` has sent to a tracker is not lost in a power cut either, because `Outbox.step` first syncs
    the file to the disk.
    """

    path: Path
    _descriptor: int = field(init=False)
    _size: int = field(init=False)
    _lock: threading.Lock = field(init=False, factory=threading.Lock)

    def __attrs_post_init__(self) -> None:
        self._descriptor = _open_whole(self.path)
        self._size = os.fstat(self._descriptor).st_size

    def append(self, kind: str, fields: Mapping[str, Any], *, time_ms: int | None = None) -> None:
        """Append one line about an event at `time_ms`, in milliseconds since 1970; None means now.

        Raises:
            RunFailedError: The file cannot be written, for example because the disk is full.
        """
        with self._lock:
            line = encode(kind, fields, time_ms=now_ms() if time_ms is None else time_ms)
            size = self._size + len(line)
            try:
                while line:  # a nearly full disk may accept only the first bytes of a line
                    line = line[os.write(self._descriptor, line) :]
            except OSError as error:
                os.ftruncate(self._descriptor, self._size)
                raise RunFailedError(
                    f"cannot write the journal `{self.path}`: {error.strerror}",
                    hint="free some disk space; what was recorded so far is kept",
                ) from error
            self._size = size

    def close(self) -> None:
        """Close the file of the journal."""
        os.close(self._descriptor)
