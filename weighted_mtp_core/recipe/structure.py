"""Turn TOML tables into attrs classes, strictly: every fault is found, none is repaired.

A class says what is allowed: its fields are the keys, their types and validators the values. The recipe's
own tables and the `options` of every component go through the same `structure`.
"""

from __future__ import annotations

import enum
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import cattrs

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import did_you_mean
from weighted_mtp_core.recipe.describe import expected, shown
from weighted_mtp_core.recipe.lines import KeyPath

T = TypeVar("T")
Hook = Callable[[Any, Any], Any]


@attrs.frozen
class Fault:
    """One thing wrong with a recipe: at which key, what, and perhaps what to do about it."""

    path: KeyPath
    text: str
    hint: str | None = None


class _FaultsError(Exception):
    """Carries faults from a value up to `structure`, which knows where the value lies."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__(faults)
        self.faults = faults


def structure(cls: type[T], table: Mapping[str, Any], *, at: KeyPath = ()) -> tuple[T | None, list[Fault]]:
    """Make a `cls` of a TOML table that lies at `at`.

    No bool passes as an int and no float as an int; an int passes as a float; unknown and missing keys,
    non-finite numbers and values that a validator refuses are faults.

    Returns:
        The instance and no faults, or None and every fault.
    """
    try:
        return _CONVERTER.structure(table, cls), []
    except _FaultsError as error:
        return None, _under(at, error)


def plain(value: Any) -> Any:
    """Return what TOML would hold for a structured value: tables, arrays, scalars. None is left out."""
    if attrs.has(type(value)):
        fields = [a for a in attrs.fields(type(value)) if a.init]
        return plain({a.alias: getattr(value, a.name) for a in fields})
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def default_of(attribute: Any) -> Any:
    """Return the default of an attrs field, or `attrs.NOTHING`."""
    default: Any = attribute.default
    if hasattr(default, "takes_self"):  # an attrs Factory
        return attrs.NOTHING if default.takes_self else default.factory()
    return default


# --------------------------------------------------------------------------- scalars


def _wrong(kind: Any, value: Any) -> _FaultsError:
    return _FaultsError(Fault((), f"expected {expected(kind)}, got {shown(value)}"))


def _exactly(kind: type) -> Hook:
    def hook(value: Any, _: Any) -> Any:
        if type(value) is not kind:  # isinstance would take True for an int
            raise _wrong(kind, value)
        return value

    return hook


def _float(value: Any, _: Any) -> float:
    if type(value) not in {int, float}:
        raise _wrong(float, value)
    if not math.isfinite(value):
        raise _FaultsError(Fault((), f"expected a finite float, got {value}"))
    return float(value)


def _choice(kind: Any) -> Hook:
    if typing.get_origin(kind) is typing.Literal:
        members = {choice: choice for choice in typing.get_args(kind)}
    else:
        members = {member.value: member for member in kind}

    def hook(value: Any, _: Any) -> Any:
        for choice, member in members.items():
            if type(value) is type(choice) and value == choice:
                return member
        near = did_you_mean(str(value), [str(choice) for choice in members])
        text = f"expected {expected(kind)}, got {shown(value)}"
        raise _FaultsError(Fault((), f"{text}; {near}" if near else text))

    return hook


def _union(kind: Any) -> Hook:
    members = [each for each in typing.get_args(kind) if each is not types.NoneType]

    def hook(value: Any, _: Any) -> Any:
        first: _FaultsError | None = None
        for member in members:
            try:
                return _CONVERTER.structure(value, member)
            except _FaultsError as error:
                first = first or error
        raise first if first and len(members) == 1 else _wrong(kind, value)

    return hook


# --------------------------------------------------------------------------- arrays and tables


def _under(at: KeyPath, error: _FaultsError) -> list[Fault]:
    return [attrs.evolve(fault, path=(*at, *fault.path)) for fault in error.faults]


def _each(items: Iterable[tuple[str | int, Any, Any]]) -> tuple[list[Any], list[Fault]]:
    """Structure (key, value, type) triples; go on after a fault."""
    values, faults = [], []
    for key, value, kind in items:
        try:
            values.append(_CONVERTER.structure(value, kind))
        except _FaultsError as error:
            faults += _under((key,), error)
    return values, faults


def _array(kind: Any) -> Hook:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    into: Callable[[list[Any]], Any] = tuple if origin is Sequence else origin
    fixed = origin is tuple and arguments[-1] is not Ellipsis

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, list):
            raise _wrong(kind, value)
        if fixed and len(value) != len(arguments):
            raise _FaultsError(Fault((), f"expected {expected(kind)}, got {len(value)} elements"))
        kinds = arguments if fixed else [arguments[0]] * len(value)
        values, faults = _each((i, each, kinds[i]) for i, each in enumerate(value))
        if faults:
            raise _FaultsError(*faults)
        return into(values)

    return hook


def _mapping(kind: Any) -> Hook:
    item_kind = typing.get_args(kind)[1]

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise _wrong(kind, value)
        values, faults = _each((key, item, item_kind) for key, item in value.items())
        if faults:
            raise _FaultsError(*faults)
        return dict(zip(value, values, strict=True))

    return hook


def _table(cls: type[Any]) -> Hook:
    attrs.resolve_types(cls)
    fields = {a.alias or a.name: a for a in attrs.fields(cls) if a.init}

    def hook(table: Any, _: Any) -> Any:
        if not isinstance(table, dict):
            raise _wrong(cls, table)
        faults = [_unknown(key, fields) for key in table if key not in fields]
        values: dict[str, Any] = {}
        for key, attribute in fields.items():
            if key in table or (attribute.default is attrs.NOTHING and attrs.has(attribute.type)):
                # A missing table is read as an empty one: its own missing keys say more than "missing".
                structured, wrong = _each([(key, table.get(key, {}), attribute.type)])
                faults += wrong
                values |= zip([key], structured, strict=False)
            elif attribute.default is attrs.NOTHING:
                faults.append(Fault((key,), f"missing; expected {expected(attribute.type)}"))
        faults += _refused(cls, fields, values)
        if faults:
            raise _FaultsError(*faults)
        return _construct(cls, values)

    return hook


def _unknown(key: str, fields: Iterable[str]) -> Fault:
    near = did_you_mean(key, fields)
    text = f"unknown key `{key}`; known keys: {', '.join(fields)}"
    return Fault((key,), f"{text}; {near}" if near else text)


def _refused(cls: type[Any], fields: Mapping[str, Any], values: Mapping[str, Any]) -> list[Fault]:
    """Run each key's validator: the constructor would stop at the first that refuses."""
    probe = object.__new__(cls)
    known = {key: default_of(attribute) for key, attribute in fields.items()} | dict(values)
    known = {key: value for key, value in known.items() if value is not attrs.NOTHING}
    for key, value in known.items():
        object.__setattr__(probe, fields[key].name, value)
    faults = []
    for key, value in known.items():
        attribute = fields[key]
        if attribute.validator is None or attribute.converter is not None:
            continue
        try:
            attribute.validator(probe, attribute, value)
        except (ValueError, TypeError) as error:
            faults.append(Fault((key,), _words(error, attribute.name)))
        except AttributeError:
            continue  # it compares with a key that is itself at fault
    return faults


def _construct(cls: type[Any], values: Mapping[str, Any]) -> Any:
    try:
        return cls(**values)
    except (ValueError, TypeError, WmtpError) as error:
        raise _FaultsError(Fault((), _words(error, ""))) from error


def _words(error: Exception, name: str) -> str:
    """Return a validator's sentence without the key in front of it: the message names the key itself."""
    return str(error.args[0] if error.args else error).removeprefix(f"'{name}' ")


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in {typing.Union, types.UnionType}


def _is_choice(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Literal or (
        isinstance(kind, type) and issubclass(kind, enum.Enum)
    )


def _is_array(kind: Any) -> bool:
    return typing.get_origin(kind) in {tuple, list, set, frozenset, Sequence}


def _is_mapping(kind: Any) -> bool:
    return typing.get_origin(kind) in {dict, Mapping}


def _strict_converter() -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=False)
    for kind in (int, str, bool):
        converter.register_structure_hook(kind, _exactly(kind))
    converter.register_structure_hook(float, _float)
    converter.register_structure_hook(Path, lambda value, _: Path(_CONVERTER.structure(value, str)))
    converter.register_structure_hook_factory(_is_union, _union)
    converter.register_structure_hook_factory(_is_choice, _choice)
    converter.register_structure_hook_factory(_is_array, _array)
    converter.register_structure_hook_factory(_is_mapping, _mapping)
    converter.register_structure_hook_factory(attrs.has, _table)
    return converter


_CONVERTER = _strict_converter()
