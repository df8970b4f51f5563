"""Only plain data passes between the tests and a program, and no sequence of bytes breaks the decoder."""

from __future__ import annotations

import socket
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weighted_mtp_code_tasks.sandbox import wire
from weighted_mtp_code_tasks.sandbox.wire import FrameError, UnencodableError, decode, encode

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters(codec=None))
    | st.binary()
)
HASHABLE = st.recursive(ATOMS, lambda inner: st.lists(inner).map(tuple) | st.frozensets(inner), max_leaves=8)
VALUES = st.recursive(
    HASHABLE,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(HASHABLE, inner) | st.sets(HASHABLE)
    ),
    max_leaves=20,
)


def shape(value: object) -> object:
    """Return a value with the type of everything in it, so that 1, 1.0 and True differ."""
    match value:
        case dict():
            return dict, [(shape(key), shape(item)) for key, item in value.items()]
        case list() | tuple():
            return type(value), [shape(item) for item in value]
        case set() | frozenset():
            return type(value), sorted(repr(shape(item)) for item in value)
    return type(value), repr(value)


@settings(max_examples=50)
@given(VALUES)
def test_a_plain_value_comes_back_the_same_with_the_same_types(value: object) -> None:
    assert shape(decode(encode(value))) == shape(value)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_frame_error(data: bytes) -> None:
    try:
        value = decode(data)
    except FrameError:
        return

    assert shape(decode(encode(value))) == shape(value)


@settings(max_examples=50)
@given(VALUES, st.data())
def test_a_value_cut_off_is_a_frame_error(value: object, data: st.DataObject) -> None:
    content = encode(value)
    length = data.draw(st.integers(0, len(content) - 1))

    with pytest.raises(FrameError):
        decode(content[:length])


def test_a_float_crosses_bit_for_bit() -> None:
    for bits in (0x0000000000000001, 0x8000000000000000, 0x7FF0000000000000, 0x7FF8000000000123):
        value = struct.unpack("<d", struct.pack("<Q", bits))[0]

        assert struct.pack("<d", decode(encode(value))) == struct.pack("<Q", bits)


class EqualToAll(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


class Quiet(int):
    def __int__(self) -> int:
        return 7

    def __index__(self) -> int:
        return 7


@pytest.mark.parametrize(
    "value",
    [
        object(),
        EqualToAll(1),
        Fraction(1, 2),
        deque([1]),
        range(3),
        iter([]),
        print,
        type,
        Exception("x"),
        ...,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_plain_does_not_cross(value: object) -> None:
    with pytest.raises(UnencodableError):
        encode([1, value])


def test_a_subclass_with_its_bases_equality_crosses_as_its_base() -> None:
    Point = namedtuple("Point", "x y")  # noqa: PYI024 - what programs write
    value = [Counter("aab"), OrderedDict(a=1), defaultdict(int, a=1), Point(1, 2), Quiet(3)]

    assert shape(decode(encode(value))) == shape([{"a": 2, "b": 1}, {"a": 1}, {"a": 1}, (1, 2), 3])


def test_a_builtin_class_crosses_and_no_other() -> None:
    assert decode(encode([int, str])) == [int, str]
    with pytest.raises(UnencodableError):
        encode(EqualToAll)


def test_an_object_crosses_as_a_number_where_there_is_one() -> None:
    content = encode([1, ...], lambda value: 5 if value is ... else None)

    assert decode(content, lambda number: number * 10) == [1, 50]
    with pytest.raises(FrameError):
        decode(content)


def test_depth_count_and_size_are_bounded() -> None:
    deep: list[object] = []
    for _ in range(wire.MAX_DEPTH):
        deep = [deep]
    for value in (
        deep,
        [0] * (wire.MAX_NODES + 1),
        "x" * (wire.MAX_FRAME_BYTES + 1),
        1 << (8 * wire.MAX_INT_BYTES),
    ):
        with pytest.raises(UnencodableError):
            encode(value)


@pytest.mark.parametrize(
    "content",
    [
        b"l\x01\x00\x00\x00" * 65 + b"N",  # deeper than any value
        b"l\xff\xff\xff\xff",  # four billion values in no bytes
        b"d\xff\xff\xff\xff" + bytes(100),
        b"i" + struct.pack("<I", wire.MAX_INT_BYTES + 1) + bytes(wire.MAX_INT_BYTES + 1),
        b"S\x01\x00\x00\x00l\x00\x00\x00\x00",  # a list in a set, which cannot be hashed
        b"y\x04\x00\x00\x00eval",
        b"\x80\x04K\x01.",  # a pickle
        b"NN",
        b"",
    ],
)
def test_hostile_bytes_are_a_frame_error(content: bytes) -> None:
    with pytest.raises(FrameError):
        decode(content)


def test_a_frame_longer_than_any_is_refused_before_it_is_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("<I", 1 << 31))

        with pytest.raises(FrameError):
            wire.receive_frame(ours)


def test_a_closed_channel_is_the_end_of_file() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(struct.pack("<I", 10) + b"abc")
        theirs.close()

        with pytest.raises(EOFError):
            wire.receive_frame(ours)
