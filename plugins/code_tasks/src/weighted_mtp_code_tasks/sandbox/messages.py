"""Messages between a worker and its caller, both trusted: JSON objects, preceded by their length."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Protocol

_LENGTH = struct.Struct(">I")


class RawReader(Protocol):
    """An unbuffered binary file that is open for reading."""

    def read(self, size: int, /) -> bytes | None:
        """Return up to `size` bytes; no bytes at the end of the file, None if no bytes are available yet."""


class RawWriter(Protocol):
    """An unbuffered binary file that is open for writing."""

    def write(self, data: memoryview, /) -> int | None:
        """Write the beginning of `data`; return the number of written bytes, or None if the file is busy."""


def read_message(stream: RawReader) -> dict[str, Any] | None:
    """Read and return one message; None if the stream ends before or within the message."""
    header = _read_exactly(stream, _LENGTH.size)
    if header is None:
        return None
    content = _read_exactly(stream, _LENGTH.unpack(header)[0])
    return None if content is None else dict(json.loads(content))


def write_message(stream: RawWriter, message: Mapping[str, object]) -> None:
    """Write one message."""
    content = json.dumps(message).encode()
    left = memoryview(_LENGTH.pack(len(content)) + content)
    while left:
        left = left[stream.write(left) or 0 :]


def _read_exactly(stream: RawReader, length: int) -> bytes | None:
    content = bytearray()
    while len(content) < length:
        part = stream.read(length - len(content))
        if not part:
            return None
        content += part
    return bytes(content)
