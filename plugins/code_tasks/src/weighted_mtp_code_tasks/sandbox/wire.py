"""Encode and decode the plain data that an untrusted program and the judging process exchange.

A value is encoded as a tag byte and its content; pickle is not used. Values have limited size and only known
types, so decoding a value never executes code of the sender. The limits of the encoder give honest programs a
clear error; only the limits of the decoder stop hostile programs, which may bypass the encoder.
"""

from __future__ import annotations

import socket
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 64
MAX_NODES = 1_000_000
MAX_INT_BYTES = 128 * 1024
MAX_FRAME_BYTES = 8 * 1024 * 1024

_FLOAT = struct.Struct("<d")  # keeps every bit, also of NaN and -0.0
_COMPLEX = struct.Struct("<dd")
_SIZE = struct.Struct("<I")


class UnencodableError(Exception):
    """Raised if a value is not plain data or is too large to be encoded."""


class FrameError(Exception):
    """Raised if received bytes are not a valid message: they are too long, truncated or malformed."""


# --------------------------------------------------------------------------- encoding


def encode(value: object, reference: Callable[[object], int | None] = lambda _: None) -> bytes:
    """Return the bytes of a plain value.

    Args:
        value: None, a bool, int, float, complex, str or bytes; a list, tuple, set, frozenset or dict of such
            values; or one of these classes. An instance of a subclass is encoded as its built-in base class,
            unless the subclass defines equality; but Counter and OrderedDict are encoded as dict.
        reference: Called for any other object; returns the number that stands for the object, or None.

    Raises:
        UnencodableError: The value has another type, is nested too deeply, is too large, or changes while it
            is encoded.
    """
    encoder = _Encoder(reference)
    try:
        encoder.write(value, MAX_DEPTH)
    except RuntimeError as error:  # another thread of the program changed a container
        raise UnencodableError(f"the value changed while it was read: {error}") from None
    return bytes(encoder.out)


class _Encoder:
    def __init__(self, reference: Callable[[object], int | None]) -> None:
        self.out = bytearray()
        self._reference = reference
        self._nodes = 0

    def write(self, value: object, depth: int) -> None:
        self._nodes += 1
        if depth == 0 or self._nodes > MAX_NODES or len(self.out) > MAX_FRAME_BYTES:
            raise UnencodableError(
                f"deeper than {MAX_DEPTH} levels, or more than {MAX_NODES} values or {MAX_FRAME_BYTES} bytes"
            )
        kind = type(value)
        write = _WRITERS.get(kind) or _WRITERS.get(_plain_base(kind))
        if write is not None:
            write(self, value, depth - 1)
        elif kind is type and value in _TYPES:
            self.sized(b"y", value.__name__.encode())
        elif (number := self._reference(value)) is not None:
            self.out += b"h" + _SIZE.pack(number)
        else:
            raise UnencodableError(f"a `{kind.__name__}` is not plain data")

    def container(self, tag: bytes, length: int) -> None:
        if self._nodes + length > MAX_NODES:
            raise UnencodableError(f"more than {MAX_NODES} values")
        self.out += tag + _SIZE.pack(length)

    def sized(self, tag: bytes, content: bytes, *, at_most: int = MAX_FRAME_BYTES) -> None:
        if len(content) > at_most:
            raise UnencodableError(f"a value of more than {at_most} bytes")
        self.out += tag + _SIZE.pack(len(content)) + content


def _plain_base(kind: type) -> type:
    """Return the built-in type as which instances of `kind` are encoded; `kind` itself if there is none."""
    for base in _WRITERS:
        if issubclass(kind, base) and (_equality(kind) is _equality(base) or kind in (Counter, OrderedDict)):
            return base
    return kind


def _equality(kind: Any) -> object:
    return kind.__eq__


def _write_none(encoder: _Encoder, _: object, __: int) -> None:
    encoder.out += b"N"


def _write_bool(encoder: _Encoder, value: object, _: int) -> None:
    encoder.out += b"T" if value else b"F"


def _write_int(encoder: _Encoder, value: int, _: int) -> None:
    if int.bit_length(value) >= 8 * MAX_INT_BYTES:
        raise UnencodableError(f"an int of more than {MAX_INT_BYTES} bytes")
    length = int.bit_length(value) // 8 + 1
    encoder.sized(b"i", int.to_bytes(value, length, "little", signed=True))


def _write_float(encoder: _Encoder, value: float, _: int) -> None:
    encoder.out += b"f" + _FLOAT.pack(float.__float__(value))


def _write_complex(encoder: _Encoder, value: complex, _: int) -> None:
    plain = complex.__complex__(value)
    encoder.out += b"c" + _COMPLEX.pack(plain.real, plain.imag)


def _write_str(encoder: _Encoder, value: str, _: int) -> None:
    encoder.sized(b"s", str.encode(value, "utf-8", "surrogatepass"))


def _write_bytes(encoder: _Encoder, value: bytes, _: int) -> None:
    encoder.sized(b"b", bytes.__getitem__(value, slice(None)))


def _write_dict(encoder: _Encoder, value: dict[object, object], depth: int) -> None:
    encoder.container(b"d", dict.__len__(value))
    for key, item in dict.items(value):
        encoder.write(key, depth)
        encoder.write(item, depth)


def _sequence_writer(kind: Any, tag: bytes) -> Callable[[_Encoder, Any, int], None]:
    def write(encoder: _Encoder, value: object, depth: int) -> None:
        encoder.container(tag, kind.__len__(value))
        for item in kind.__iter__(value):
            encoder.write(item, depth)

    return write


# Only methods of the built-in types are called, never those of a subclass. bool precedes its base class, int.
_WRITERS: dict[type, Callable[[_Encoder, Any, int], None]] = {
    type(None): _write_none,
    bool: _write_bool,
    int: _write_int,
    float: _write_float,
    complex: _write_complex,
    str: _write_str,
    bytes: _write_bytes,
    dict: _write_dict,
    list: _sequence_writer(list, b"l"),
    tuple: _sequence_writer(tuple, b"t"),
    set: _sequence_writer(set, b"S"),
    frozenset: _sequence_writer(frozenset, b"Z"),
}
_TYPES = (bool, int, float, complex, str, bytes, dict, list, tuple, set, frozenset)
_TYPE_NAMED = {kind.__name__.encode(): kind for kind in _TYPES}


# --------------------------------------------------------------------------- decoding


def decode(data: bytes, resolve: Callable[[int], object] | None = None) -> object:
    """Return the value that was encoded by `encode`.

    Args:
        data: The bytes of one value.
        resolve: Returns the object for which a number stands; without `resolve`, such numbers are an error.

    Raises:
        FrameError: The bytes are not a valid value or exceed the limits.
    """
    decoder = _Decoder(data, resolve)
    try:
        value = decoder.read(MAX_DEPTH)
    except (struct.error, IndexError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise FrameError(f"malformed value: {error}") from None
    if not decoder.at_end():
        raise FrameError("malformed value: bytes left over")
    return value


class _Decoder:
    def __init__(self, data: bytes, resolve: Callable[[int], object] | None) -> None:
        self._data = data
        self._at = 0
        self._resolve = resolve
        self._nodes = 0

    def at_end(self) -> bool:
        return self._at == len(self._data)

    def read(self, depth: int) -> object:
        self._nodes += 1
        if depth == 0 or self._nodes > MAX_NODES:
            raise FrameError(
                f"deeper than {MAX_DEPTH} levels, or more than {MAX_NODES} values or {MAX_FRAME_BYTES} bytes"
            )
        return _READERS[self.take(1)](self, depth - 1)

    def size(self) -> int:
        return int(_SIZE.unpack(self.take(4))[0])

    def items(self, depth: int, *, each: int = 1) -> list[object]:
        """Read a count n, then n * `each` values; FrameError if fewer bytes than values are left."""
        count = self.size() * each
        if count > len(self._data) - self._at:
            raise FrameError("malformed value: cut off")
        return [self.read(depth) for _ in range(count)]

    def take(self, length: int) -> bytes:
        content = self._data[self._at : self._at + length]
        if len(content) != length:
            raise FrameError("malformed value: cut off")
        self._at += length
        return content

    def resolved(self) -> object:
        if self._resolve is None:
            raise FrameError("malformed value: a handle where none may be")
        return self._resolve(self.size())


def _read_int(decoder: _Decoder, _: int) -> int:
    content = decoder.take(decoder.size())
    if len(content) > MAX_INT_BYTES:
        raise FrameError(f"an int of more than {MAX_INT_BYTES} bytes")
    return int.from_bytes(content, "little", signed=True)


def _read_dict(decoder: _Decoder, depth: int) -> dict[object, object]:
    flat = iter(decoder.items(depth, each=2))
    return dict(zip(flat, flat, strict=True))


_READERS: dict[bytes, Callable[[_Decoder, int], object]] = {
    b"N": lambda _, __: None,
    b"T": lambda _, __: True,
    b"F": lambda _, __: False,
    b"i": _read_int,
    b"f": lambda decoder, _: _FLOAT.unpack(decoder.take(8))[0],
    b"c": lambda decoder, _: complex(*_COMPLEX.unpack(decoder.take(16))),
    b"s": lambda decoder, _: decoder.take(decoder.size()).decode("utf-8", "surrogatepass"),
    b"b": lambda decoder, _: decoder.take(decoder.size()),
    b"d": _read_dict,
    b"l": lambda decoder, depth: decoder.items(depth),
    b"t": lambda decoder, depth: tuple(decoder.items(depth)),
    b"S": lambda decoder, depth: set(decoder.items(depth)),
    b"Z": lambda decoder, depth: frozenset(decoder.items(depth)),
    b"y": lambda decoder, _: _TYPE_NAMED[decoder.take(decoder.size())],
    b"h": lambda decoder, _: decoder.resolved(),
}


# --------------------------------------------------------------------------- framing


def send_frame(channel: socket.socket, content: bytes) -> None:
    """Send a message, preceded by its length.

    Raises:
        OSError: The other end of the channel is closed, or the channel's timeout has passed (TimeoutError).
    """
    channel.sendall(_SIZE.pack(len(content)) + content)


def receive_frame(channel: socket.socket) -> bytes:
    """Receive and return a message.

    Raises:
        EOFError: The other end of the channel is closed.
        FrameError: The message is longer than allowed.
        OSError: The channel fails, or its timeout has passed (TimeoutError).
    """
    size = int(_SIZE.unpack(_receive_exactly(channel, 4))[0])
    if size > (limit := MAX_FRAME_BYTES + 4096):
        raise FrameError(f"a message of {size} bytes, more than {limit}")
    return _receive_exactly(channel, size)


def _receive_exactly(channel: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = channel.recv(min(length - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
