"""`structure` is strict and reports all faults at once."""

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from attrs import field, fields, frozen
from attrs import validators as v
from weighted_mtp_core.recipe.load import credential_faults
from weighted_mtp_core.recipe.structure import plain, structure


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@frozen(kw_only=True)
class Inner:
    depth: int
    share: float = field(default=0.5, validator=[v.ge(0), v.le(1)])


@frozen(kw_only=True)
class Options:
    steps: int = field(default=3, validator=v.ge(1))
    rate: float = 1.0
    name: str = "x"
    flag: bool = False
    mode: Literal["mean", "max"] = "mean"
    colour: Colour = Colour.RED
    clip: tuple[float, float] = (0.1, 3.0)
    ks: tuple[int, ...] = ()
    words: list[str] = field(factory=list)
    names: frozenset[str] = frozenset()
    maybe: int | None = None
    either: int | str = 0
    shares: Mapping[str, float] = field(factory=dict)
    file: Path = Path()
    inner: Inner = Inner(depth=1)
    anything: Any = None


KEYS = ", ".join(each.name for each in fields(Options))


@pytest.mark.parametrize(
    ("key", "toml", "value"),
    [
        ("rate", 2, 2.0),
        ("colour", "blue", Colour.BLUE),
        ("clip", [1, 2.5], (1.0, 2.5)),
        ("ks", [1, 2], (1, 2)),
        ("words", ["a"], ["a"]),
        ("names", ["b", "a"], frozenset({"a", "b"})),
        ("maybe", 4, 4),
        ("either", "a", "a"),
        ("shares", {"a": 1}, {"a": 1.0}),
        ("file", "a/b", Path("a/b")),
        ("inner", {"depth": 2}, Inner(depth=2)),
        ("anything", {"a": [1]}, {"a": [1]}),
    ],
)
def test_toml_values_become_the_type_of_the_field(key, toml, value):
    options, faults = structure(Options, {key: toml})

    assert faults == []
    assert getattr(options, key) == value
    assert type(getattr(options, key)) is type(value)


@pytest.mark.parametrize(
    ("key", "toml", "text"),
    [
        ("steps", True, "expected int, got bool True"),
        ("steps", 3.5, "expected int, got float 3.5"),
        ("steps", 3.0, "expected int, got float 3.0"),
        ("steps", "3", "expected int, got str '3'"),
        ("steps", {}, "expected int, got table"),
        ("steps", 0, "must be >= 1: 0"),
        ("rate", True, "expected float, got bool True"),
        ("rate", float("nan"), "expected a finite float, got nan"),
        ("rate", float("inf"), "expected a finite float, got inf"),
        ("name", 3, "expected str, got int 3"),
        ("flag", "false", "expected bool, got str 'false'"),
        ("flag", 0, "expected bool, got int 0"),
        ("mode", "maxx", "expected one of `mean`, `max`, got str 'maxx'; did you mean `max`?"),
        ("colour", "green", "expected one of `red`, `blue`, got str 'green'"),
        ("clip", [1.0], "expected array of 2: float, float, got 1 elements"),
        ("ks", 1, "expected array of int, got int 1"),
        ("words", "word", "expected array of str, got str 'word'"),
        ("names", "ab", "expected array of str, got str 'ab'"),
        ("maybe", "a", "expected int, got str 'a'"),
        ("either", 1.5, "expected int or str, got float 1.5"),
        ("shares", [], "expected table, got array"),
        ("inner", 3, "expected table, got int 3"),
        ("name", ["a"], "expected str, got array"),
        ("steps", "a" * 100, f"expected int, got str '{'a' * 59}..."),
    ],
)
def test_nothing_is_converted_silently(key, toml, text):
    options, faults = structure(Options, {key: toml}, at=("t",))

    assert options is None
    assert [(fault.path, fault.text) for fault in faults] == [(("t", key), text)]


def test_all_faults_are_found_at_once_types_and_ranges_and_names():
    _, faults = structure(
        Options,
        {"stepps": 1, "steps": 0, "rate": "x", "ks": [1, "a", True], "inner": {"share": 2.0, "dept": 1}},
    )

    assert [(fault.path, fault.text) for fault in faults] == [
        (
            ("stepps",),
            f"unknown key `stepps`; known keys: {KEYS}; did you mean `steps`?",
        ),
        (("rate",), "expected float, got str 'x'"),
        (("ks", 1), "expected int, got str 'a'"),
        (("ks", 2), "expected int, got bool True"),
        (("inner", "dept"), "unknown key `dept`; known keys: depth, share; did you mean `depth`?"),
        (("inner", "depth"), "missing; expected int"),
        (("inner", "share"), "must be <= 1: 2.0"),
        (("steps",), "must be >= 1: 0"),
    ]


@frozen(kw_only=True)
class Range:
    low: int = 0
    high: int = field(default=9)
    width: int = field(default=1, converter=abs)

    @high.validator
    def _above_low(self, _, value):
        if value < self.low:
            raise ValueError(f"must be >= `low` = {self.low}: {value}")

    def __attrs_post_init__(self):
        if self.width > 100:
            raise ValueError("too wide")


def test_a_validator_may_compare_with_another_key():
    _, faults = structure(Range, {"low": 5, "high": 3})

    assert [(fault.path, fault.text) for fault in faults] == [(("high",), "must be >= `low` = 5: 3")]


def test_a_validator_is_silent_about_a_key_that_is_itself_wrong():
    _, faults = structure(Range, {"low": "x", "high": 3})

    assert [fault.path for fault in faults] == [("low",)]


def test_an_error_of_the_constructor_is_a_fault_of_the_table():
    _, faults = structure(Range, {"width": -500}, at=("weighting", "options"))

    assert [(fault.path, fault.text) for fault in faults] == [(("weighting", "options"), "too wide")]


def test_attrs_converters_run():
    assert structure(Range, {"width": -5}) == (Range(width=5), [])


@frozen(kw_only=True)
class Unparametrised:
    names: list
    table: dict


def test_lists_and_dicts_of_anything_are_taken_as_they_are():
    assert structure(Unparametrised, {"names": [1, "a"], "table": {"a": []}}) == (
        Unparametrised(names=[1, "a"], table={"a": []}),
        [],
    )


@frozen(kw_only=True)
class Unsupported:
    size: complex = 0j


def test_a_type_that_toml_lacks_is_an_error_of_the_class():
    with pytest.raises(TypeError, match=r"a recipe cannot contain a value of type <class 'complex'>"):
        structure(Unsupported, {"size": 1})


def test_plain_returns_toml_values():
    table = {"colour": "blue", "clip": [1.0, 2.0], "file": "a/b", "inner": {"depth": 2, "share": 0.1}}
    options, _ = structure(Options, table)

    assert plain(options) == {
        "steps": 3, "rate": 1.0, "name": "x", "flag": False, "mode": "mean", "ks": [], "words": [],
        "either": 0, "shares": {}, "names": [],
    } | table  # fmt: skip


def test_a_password_in_a_uri_is_found_anywhere_and_never_shown():
    table = {
        "tracker": [{"options": {"uri": "https://ann:s3cret@host/x"}}],
        "ok": "https://host:80/a@b",
        "n": 1,
    }

    faults = credential_faults(table)

    assert [fault.path for fault in faults] == [("tracker", 0, "options", "uri")]
    assert "s3cret" not in faults[0].text


def test_a_wrong_value_with_a_password_is_not_shown_either():
    _, faults = structure(Options, {"steps": "https://ann:s3cret@host"})

    assert "s3cret" not in faults[0].text
