"""Parse `--set KEY=VALUE`, for example `train.steps=50` or `tracker.0.options.x=[1, 2]`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import tomli

from weighted_mtp_core.errors import WmtpError


def parse_overrides(texts: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Return the key, split at its dots, and the value of each override; overrides of `use` come first.

    An override of `use` discards the options of the previous component. Because overrides of `use` are
    applied first, they do not discard options that the same command line sets.

    Raises:
        WmtpError: An override does not have the form KEY=VALUE, or its value is malformed.
    """
    return sorted(map(parse_override, texts), key=lambda override: override[0][-1] != "use")


def parse_override(text: str) -> tuple[list[str], Any]:
    """Return the key, split at its dots, and the value of one override of the form KEY=VALUE.

    Raises:
        WmtpError: The override does not have the form KEY=VALUE, or its value is malformed.
    """
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(re.fullmatch(r"[A-Za-z0-9_-]+", each) for each in keys):
        example = "write --set KEY=VALUE, for example: --set train.steps=50"
        raise WmtpError(f"cannot read `--set {text}`", hint=example)
    return keys, _parse_value(value.strip(), text=text)


def _parse_value(value: str, *, text: str) -> Any:
    """Parse a TOML value; a text that is not TOML becomes a string, so `model.base=micro` needs no quotes.

    Raises:
        WmtpError: The text begins like a TOML string, array or inline table, but is malformed.
    """
    try:
        table = tomli.loads(f"value = {value}")
    except tomli.TOMLDecodeError as error:
        if value[:1] in {'"', "'", "[", "{"}:
            raise WmtpError(f"cannot read the value in `--set {text}`: {error}") from error
        return value
    return table["value"] if len(table) == 1 else value
