"""Identifiers that a recipe passes to trackers and folders: experiment, tags, params.

MLflow accepts experiment names such as `../../evil` or with NUL bytes, so they are checked here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_RESERVED_TAG = re.compile(r"algo|model_version|wmtp\..*|mlflow\..*")
_TAG_KEY = re.compile(r"[A-Za-z0-9_./ -]+")  # accepted by every MLflow store


def check_path(name: str) -> None:
    """Check a name such as `team/a`; each of its parts becomes a folder.

    Raises:
        ValueError: A part is not usable as a folder's name.
    """
    for part in name.split("/"):
        if ".." in part or not re.fullmatch(NAME, part):
            raise ValueError(f"each part of {name!r} must match `{NAME}`, without `..`; {part!r} does not")


def check_tags(tags: Sequence[str]) -> None:
    """Check a recipe's own tags.

    Raises:
        ValueError: A tag is not "key:value", or its key is reserved or given twice.
    """
    seen = set()
    for tag, (key, value) in zip(tags, tag_pairs(tags), strict=True):
        if not value or not _TAG_KEY.fullmatch(key):
            raise ValueError(f'expected "key:value", got {tag!r}')
        if _RESERVED_TAG.fullmatch(key):
            raise ValueError(f"tag `{key}` is written by the run itself; choose another key")
        if key in seen:
            raise ValueError(f"tag `{key}` is given twice")
        seen.add(key)


def tag_pairs(tags: Sequence[str]) -> list[tuple[str, str]]:
    """Split "key:value" tags at the first colon."""
    split = [tag.partition(":") for tag in tags]
    return [(key.strip(), value.strip()) for key, _, value in split]


def flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the text of every value in nested tables and arrays of tables."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from flat(item, f"{key}.{i}")
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
