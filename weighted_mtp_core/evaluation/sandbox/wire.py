"""Plain data between the trusted side and a candidate: bounded, never pickle, exact types only.

A value is a tag byte and its content; nothing that is decoded can run code, and whoever sits at the other end
can at most answer with *values*. Limits hold on both sides: the encoder's spare an honest program, the
decoder's bind a hostile one.
"""

from __future__ import annotations

import socket
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

MAX_DEPTH = 64
MAX_NODES = 1_000_000
MAX_INT_BYTES = 128 * 1024
MAX_FRAME_BYTES = 8 * 1024 * 1024

_FLOAT = struct.Struct("<d")
_COMPLEX = struct.Struct("<dd")
_SIZE = struct.Struct("<I")

_SEQUENCES: dict[type, bytes] = {list: b"l", tuple: b"t", set: b"S", frozenset: b"Z"}
_BUILDERS: dict[bytes, Callable[[Iterable[object]], object]] = {
    b"l": list,
    b"t": tuple,
    b"S": set,
    b"Z": frozenset,
}
_PLAIN = (bool, int, float, complex, str, bytes, *_SEQUENCES, dict)
_SAME_AS_DICT = (Counter, OrderedDict)


class UnencodableError(Exception):
    """A value is not bounded plain data."""


class FrameError(Exception):
    """The bytes that arrived are no message: too long, cut off or malformed."""


def encode(value: object, reference: Callable[[object], int | None] = lambda _: None) -> bytes:
    """Return the bytes of a plain value.

    Args:
        value: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset or dict of such.
            A subclass is taken as its plain base if it does not bring its own notion of equality.
        reference: Names objects that cross as a number only (handles), or None for everything else.

    Raises:
        UnencodableError: Another type, or too deep, too many or too large.
    """
    out = bytearray()
    try:
        _Encoder(out, reference).write(value, MAX_DEPTH)
    except RuntimeError as error:  # another thread of the program changes a container meanwhile
        raise UnencodableError(f"the value changed while it was read: {error}") from None
    return bytes(out)


class _Encoder:
    def __init__(self, out: bytearray, reference: Callable[[object], int | None]) -> None:
        self._out = out
        self._reference = reference
        self._nodes = 0

    def write(self, value: object, depth: int) -> None:
        self._nodes += 1
        if depth == 0 or self._nodes > MAX_NODES or len(self._out) > MAX_FRAME_BYTES:
            raise UnencodableError(f"deeper than {MAX_DEPTH} or larger than {MAX_NODES} values")
        out = self._out
        kind = type(value)
        if kind not in _PLAIN and value is not None:
            base = _plain_base(kind)
            number = self._reference(value) if base is None else None
            if number is not None:
                out += b"h" + _SIZE.pack(number)
                return
            if base is None:
                raise UnencodableError(f"a `{kind.__name__}` is not plain data")
            kind = base
        if value is None:
            out += b"N"
        elif kind is bool:
            out += b"T" if value else b"F"
        elif kind is int:
            self._sized(b"i", _int_bytes(int.__index__(value)))  # type: ignore[arg-type]
        elif kind is float:
            out += b"f" + _FLOAT.pack(float.__float__(value))  # type: ignore[arg-type]
        elif kind is complex:
            out += b"c" + _COMPLEX.pack(*complex.__getnewargs__(value))  # type: ignore[arg-type]
        elif kind is str:
            self._sized(b"s", str.encode(value, "utf-8", "surrogatepass"))  # type: ignore[arg-type]
        elif kind is bytes:
            self._sized(b"b", bytes.__getitem__(value, slice(None)))  # type: ignore[arg-type]
        elif kind is dict:
            self._items(value, depth)
        else:
            self._sequence(kind, value, depth)

    def _sized(self, tag: bytes, content: bytes) -> None:
        if len(content) > MAX_FRAME_BYTES:
            raise UnencodableError(f"longer than {MAX_FRAME_BYTES} bytes")
        self._out += tag + _SIZE.pack(len(content)) + content

    def _items(self, value: object, depth: int) -> None:
        self._out += b"d" + _SIZE.pack(dict.__len__(value))  # type: ignore[arg-type]
        for key, item in dict.items(value):  # type: ignore[arg-type]
            self.write(key, depth - 1)
            self.write(item, depth - 1)

    def _sequence(self, kind: type, value: object, depth: int) -> None:
        self._out += _SEQUENCES[kind] + _SIZE.pack(kind.__len__(value))  # type: ignore[attr-defined]
        for item in kind.__iter__(value):  # type: ignore[attr-defined]
            self.write(item, depth - 1)


def _plain_base(kind: type) -> type | None:
    """Return the built-in type as which an instance of the subclass `kind` may cross."""
    for base in _PLAIN:
        if issubclass(kind, base) and (kind.__eq__ is base.__eq__ or kind in _SAME_AS_DICT):
            return base
    return None


def _int_bytes(value: int) -> bytes:
    length = value.bit_length() // 8 + 1
    if length > MAX_INT_BYTES:
        raise UnencodableError(f"an int of more than {MAX_INT_BYTES} bytes")
    return value.to_bytes(length, "little", signed=True)


def decode(data: bytes, resolve: Callable[[int], object] | None = None) -> object:
    """Return the value of `encode`'s bytes; `resolve` turns the number of a handle into its object.

    Raises:
        FrameError: The bytes are no value, or are beyond the limits.
    """
    decoder = _Decoder(data, resolve)
    try:
        value = decoder.read(MAX_DEPTH)
    except (struct.error, IndexError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise FrameError(f"malformed value: {error}") from None
    if not decoder.at_end:
        raise FrameError("malformed value: bytes left over")
    return value


class _Decoder:
    def __init__(self, data: bytes, resolve: Callable[[int], object] | None) -> None:
        self._data = data
        self._at = 0
        self._resolve = resolve
        self._nodes = 0

    @property
    def at_end(self) -> bool:
        return self._at == len(self._data)

    def read(self, depth: int) -> object:
        self._nodes += 1
        if depth == 0 or self._nodes > MAX_NODES:
            raise FrameError(f"deeper than {MAX_DEPTH} or larger than {MAX_NODES} values")
        tag = self._take(1)
        if tag in _BUILDERS:
            return _BUILDERS[tag]([self.read(depth - 1) for _ in range(self._count())])
        match tag:
            case b"N":
                return None
            case b"T" | b"F":
                return tag == b"T"
            case b"i":
                content = self._take(self._size())
                if len(content) > MAX_INT_BYTES:
                    raise FrameError(f"an int of more than {MAX_INT_BYTES} bytes")
                return int.from_bytes(content, "little", signed=True)
            case b"f":
                return _FLOAT.unpack(self._take(8))[0]
            case b"c":
                return complex(*_COMPLEX.unpack(self._take(16)))
            case b"s":
                return self._take(self._size()).decode("utf-8", "surrogatepass")
            case b"b":
                return self._take(self._size())
            case b"d":
                return {self.read(depth - 1): self.read(depth - 1) for _ in range(self._count())}
            case b"h" if self._resolve is not None:
                return self._resolve(self._size())
        raise FrameError(f"malformed value: no such tag {tag!r}")

    def _size(self) -> int:
        return int(_SIZE.unpack(self._take(4))[0])

    def _count(self) -> int:
        count = self._size()
        if count > MAX_NODES:
            raise FrameError(f"larger than {MAX_NODES} values")
        return count

    def _take(self, length: int) -> bytes:
        content = self._data[self._at : self._at + length]
        if len(content) != length:
            raise FrameError("malformed value: cut off")
        self._at += length
        return content


def send_frame(channel: socket.socket, content: bytes) -> None:
    """Send one message with its length before it."""
    channel.sendall(_SIZE.pack(len(content)) + content)


def receive_frame(channel: socket.socket) -> bytes:
    """Receive one message.

    Raises:
        EOFError: The other end is closed.
        FrameError: It is longer than `MAX_FRAME_BYTES` allows.
    """
    size = int(_SIZE.unpack(_receive_exactly(channel, 4))[0])
    if size > MAX_FRAME_BYTES + 4096:
        raise FrameError(f"a message of {size} bytes, more than {MAX_FRAME_BYTES}")
    return _receive_exactly(channel, size)


def _receive_exactly(channel: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = channel.recv(min(length - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
