"""Adapts params and tags to the limits of all MLflow stores; a value that is truncated gets a mark."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping

PARAM_VALUE, TAG_VALUE, KEY = 6000, 5000, 250
_BATCH, _BATCH_BYTES = 100, 400_000  # MLflow's limits per request are 100 of a kind and a megabyte of JSON
_ILLEGAL_KEY = re.compile(r"[^A-Za-z0-9_\-. :/]")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")  # PostgreSQL refuses NUL: status 500


def legal(values: Mapping[str, str], *, longest: int) -> dict[str, str]:
    """Return params or tags with keys and values that every store accepts, in the same order.

    Args:
        values: The params or tags.
        longest: The maximum length of a value.
    """
    fitted: dict[str, str] = {}
    for key, value in values.items():
        name = legal_key(key)
        if name in fitted:
            name = f"{name[: KEY - 9]}-{_digest(key)}"
        fitted[name] = legal_value(value, longest=longest)
    return fitted


def legal_key(key: str) -> str:
    """Replace the characters that MLflow refuses in a key; a key that is too long is cut and gets a hash."""
    name = _ILLEGAL_KEY.sub("_", key).strip("/ ") or "_"
    parts = [part if part.strip(".") else "_" for part in name.split("/")]
    name = "/".join(parts)
    return name if len(name) <= KEY else f"{name[: KEY - 9]}-{_digest(key)}"


def legal_value(value: str, *, longest: int) -> str:
    """Replace most control characters, and surrogates; a value longer than `longest` is cut and marked."""
    value = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    if len(value) <= longest:
        return value
    mark = f"... [cut: {len(value)} characters, sha256 {_digest(value)}; whole in recipe.toml]"
    return value[: longest - len(mark)] + mark


def batches(values: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Split params or tags into batches that MLflow accepts in one request each."""
    batch: dict[str, str] = {}
    size = 0
    for key, value in values.items():
        weight = 6 * (len(key) + len(value))  # bytes of JSON: at most 6 a character, or 12 for an emoji
        if batch and (len(batch) == _BATCH or size + weight > _BATCH_BYTES):
            yield batch
            batch, size = {}, 0
        batch[key] = value
        size += weight
    if batch:
        yield batch


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
