"""Convert TOML tables strictly to attrs classes: every fault is reported, and no fault is corrected silently.

The fields of a class are the keys of a table; the types and validators of the fields define the allowed
values. The function `structure` converts both the recipe's own tables and the `options` of every component.
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

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import did_you_mean, quoted
from weighted_mtp_core.recipe.line_numbers import KeyPath
from weighted_mtp_core.redaction import redact

T = TypeVar("T")
_LONGEST = 60  # characters of a value in a message


@attrs.frozen
class Fault:
    """One error in a recipe: the path of the key, what is wrong with it and, if known, how to correct it."""

    path: KeyPath
    text: str
    hint: str | None = None


def structure(cls: type[T], table: Mapping[str, Any], *, at: KeyPath = ()) -> tuple[T | None, list[Fault]]:
    """Convert the TOML table at the path `at` to an instance of `cls`.

    A bool or a float is not accepted as an int; an int is accepted as a float. Unknown and missing keys,
    non-finite numbers and values that a validator refuses are faults.

    Returns:
        The instance and no faults, or None and every fault.
    """
    faults: list[Fault] = []
    instance = _convert(table, cls, at, faults)
    return (None if faults else instance), faults


def plain(value: Any) -> Any:
    """Return a structured value as TOML tables, arrays and scalars; keys with the value None are left out."""
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
    """Return the default of an attrs field; `attrs.NOTHING` if it is missing or depends on the instance."""
    default: Any = attribute.default
    if hasattr(default, "takes_self"):  # an attrs Factory
        return attrs.NOTHING if default.takes_self else default.factory()
    return default


def shown(value: Any) -> str:
    """Return a value with its type, such as "float 3.5" or "table", shortened and without credentials."""
    if isinstance(value, dict):
        return "table"
    if isinstance(value, list):
        return "array"
    text = repr(redact(value)) if isinstance(value, str) else str(value)
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "..."
    return f"{type(value).__name__} {text}"


def expected(kind: Any) -> str:
    """Return the name of a field's type, such as "int", "one of `a`, `b`" or "array of float"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if members := choices(kind):
        return f"one of {quoted(members)}"
    if origin in {typing.Union, types.UnionType}:
        return " or ".join(expected(each) for each in arguments if each is not types.NoneType)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"array of {len(arguments)}: " + ", ".join(expected(each) for each in arguments)
    if origin in {tuple, list, set, frozenset, Sequence}:
        return f"array of {expected(arguments[0])}"
    if origin in {dict, Mapping} or attrs.has(kind):
        return "table"
    return str(getattr(kind, "__name__", kind))


def choices(kind: Any) -> dict[Any, Any]:
    """Return the members of a Literal or Enum, keyed by their TOML values; empty for other types."""
    if typing.get_origin(kind) is typing.Literal:
        return {choice: choice for choice in typing.get_args(kind)}
    is_enum = isinstance(kind, type) and issubclass(kind, enum.Enum)
    return {member.value: member for member in kind} if is_enum else {}


_Converter = Callable[[Any, Any, KeyPath, list[Fault]], Any]


def _convert(value: Any, kind: Any, at: KeyPath, faults: list[Fault]) -> Any:
    """Convert `value` to the type `kind`; after an error, which is added to `faults`, ignore the result."""
    for applies, converter in _CONVERTERS:
        if applies(kind):
            return converter(value, kind, at, faults)
    raise TypeError(f"a recipe cannot contain a value of type {kind!r}")


def _refuse(faults: list[Fault], at: KeyPath, text: str) -> Any:
    """Add a fault and return None instead of a value."""
    faults.append(Fault(at, text))


def _mismatch(kind: Any, value: Any) -> str:
    return f"expected {expected(kind)}, got {shown(value)}"


def _exact(value: Any, kind: Any, at: KeyPath, faults: list[Fault]) -> Any:
    if type(value) is kind:  # isinstance would accept True as an int
        return value
    return _refuse(faults, at, _mismatch(kind, value))


def _float(value: Any, kind: Any, at: KeyPath, faults: list[Fault]) -> Any:
    if type(value) not in {int, float}:
        return _refuse(faults, at, _mismatch(kind, value))
    if not math.isfinite(value):
        return _refuse(faults, at, f"expected a finite float, got {value}")
    return float(value)


def _path(value: Any, _: Any, at: KeyPath, faults: list[Fault]) -> Path:
    return Path(_exact(value, str, at, faults) or "")


def _choice(value: Any, kind: Any, at: KeyPath, faults: list[Fault]) -> Any:
    members = choices(kind)
    for choice, member in members.items():
        if type(value) is type(choice) and value == choice:
            return member
    text, near = _mismatch(kind, value), did_you_mean(str(value), map(str, members))
    return _refuse(faults, at, f"{text}; {near}" if near else text)


def _union(value: Any, kind: Any, at: KeyPath, faults: list[Fault]) -> Any:
    members = [each for each in typing.get_args(kind) if each is not types.NoneType]
    wrong: list[Fault] = []
    for member in members:
        wrong = []
        converted = _convert(value, member, at, wrong)
        if not wrong:
            return converted
    faults += wrong if len(members) == 1 else [Fault(at, _mismatch(kind, value))]
    return None


def _array(value: Any, kind: Any, at: KeyPath, faults: list[Fault]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if not isinstance(value, list):
        return _refuse(faults, at, _mismatch(kind, value))
    kinds = [arguments[0]] * len(value)
    if origin is tuple and arguments[-1] is not Ellipsis:
        kinds = list(arguments)
        if len(value) != len(kinds):
            return _refuse(faults, at, f"expected {expected(kind)}, got {len(value)} elements")
    items = [_convert(*pair, (*at, i), faults) for i, pair in enumerate(zip(value, kinds, strict=True))]
    return tuple(items) if origin is Sequence else origin(items)


def _mapping(value: Any, kind: Any, at: KeyPath, faults: list[Fault]) -> Any:
    if not isinstance(value, dict):
        return _refuse(faults, at, _mismatch(kind, value))
    _, item_kind = typing.get_args(kind)
    return {key: _convert(item, item_kind, (*at, key), faults) for key, item in value.items()}


def _table(table: Any, cls: Any, at: KeyPath, faults: list[Fault]) -> Any:
    if not isinstance(table, dict):
        return _refuse(faults, at, _mismatch(cls, table))
    fields = {str(a.alias): a for a in attrs.fields(attrs.resolve_types(cls)) if a.init}
    found = [_unknown_key(key, fields, at) for key in table if key not in fields]
    values: dict[str, Any] = {}
    for key, attribute in fields.items():
        is_required = attribute.default is attrs.NOTHING
        if key in table or (is_required and attrs.has(attribute.type)):
            # A missing table is read as an empty table, because a list of its missing keys is more helpful.
            wrong: list[Fault] = []
            converted = _convert(table.get(key, {}), attribute.type, (*at, key), wrong)
            found += wrong
            if not wrong:
                values[key] = converted
        elif is_required:
            found.append(Fault((*at, key), f"missing; expected {expected(attribute.type)}"))
    found += _refused(cls, fields, values, at)
    if not found:
        try:
            return cls(**values)
        except (ValueError, TypeError, WmtpError) as error:
            found = [Fault(at, _sentence(error, ""))]
    faults += found
    return None


def _unknown_key(key: str, fields: Iterable[str], at: KeyPath) -> Fault:
    near = did_you_mean(key, fields)
    text = f"unknown key `{key}`; known keys: {', '.join(fields)}"
    return Fault((*at, key), f"{text}; {near}" if near else text)


def _refused(
    cls: type[Any], fields: Mapping[str, Any], values: Mapping[str, Any], at: KeyPath
) -> list[Fault]:
    """Return the faults that validators find; the constructor would stop at the first invalid value."""
    known = {key: default_of(attribute) for key, attribute in fields.items()} | dict(values)
    known = {key: value for key, value in known.items() if value is not attrs.NOTHING}
    instance = object.__new__(cls)
    for key, value in known.items():
        object.__setattr__(instance, fields[key].name, value)
    faults = []
    for key, value in known.items():
        attribute = fields[key]
        if isinstance(attribute.converter, attrs.Converter):
            continue  # such a converter may read the whole instance
        try:
            converted = attribute.converter(value) if attribute.converter is not None else value
            if attribute.validator is not None:
                attribute.validator(instance, attribute, converted)
        except (ValueError, TypeError) as error:
            faults.append(Fault((*at, key), _sentence(error, attribute.name)))
        except AttributeError:
            continue  # the validator compares with a key whose own value is invalid
    return faults


def _sentence(error: Exception, name: str) -> str:
    """Return a validator's message without the leading name of the key, which the fault already contains."""
    return str(error.args[0] if error.args else error).removeprefix(f"'{name}' ")


_CONVERTERS: tuple[tuple[Callable[[Any], bool], _Converter], ...] = (
    (lambda kind: kind is Any, lambda value, *_: value),
    (lambda kind: kind in {bool, int, str, list, dict}, _exact),
    (lambda kind: kind is float, _float),
    (lambda kind: kind is Path, _path),
    (lambda kind: bool(choices(kind)), _choice),
    (lambda kind: typing.get_origin(kind) in {typing.Union, types.UnionType}, _union),
    (lambda kind: typing.get_origin(kind) in {tuple, list, set, frozenset, Sequence}, _array),
    (lambda kind: typing.get_origin(kind) in {dict, Mapping}, _mapping),
    (attrs.has, _table),
)
