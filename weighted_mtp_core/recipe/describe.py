"""Describe types and values for messages and for `plugins show`."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from weighted_mtp_core.messages import quoted
from weighted_mtp_core.redaction import redact

_LONGEST = 60


def shown(value: Any) -> str:
    """Return a value's TOML type and the value, shortened and without credentials: "float 3.5", "table"."""
    if isinstance(value, dict):
        return "table"
    if isinstance(value, list):
        return "array"
    text = repr(redact(value)) if isinstance(value, str) else str(value)
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "..."
    return f"{type(value).__name__} {text}"


def expected(kind: Any) -> str:
    """Return the name of a field's type: "int", "one of `a`, `b`", "array of float"."""
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
    """Return the members of a Literal or Enum by their TOML values; empty for other types."""
    if typing.get_origin(kind) is typing.Literal:
        return {choice: choice for choice in typing.get_args(kind)}
    is_enum = isinstance(kind, type) and issubclass(kind, enum.Enum)
    return {member.value: member for member in kind} if is_enum else {}
