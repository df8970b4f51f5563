"""Messages between the caller and a worker, both trusted: a length and a JSON object over a pipe."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Protocol

_LENGTH = struct.Struct(">I")


class RawReader(Protocol):
    """An unbuffered binary file open for reading."""

    def read(self, size: int, /) -> bytes | None:
        """Return up to `size` bytes, empty at the end."""


class RawWriter(Protocol):
    """An unbuffered binary file open for writing."""

    def write(self, data: memoryview, /) -> int | None:
        """Write as many bytes as fit and return their number."""


def read_message(stream: RawReader) -> dict[str, Any] | None:
    """Read one message; None at the end of the stream."""
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
