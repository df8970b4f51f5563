"""Names that travel from a recipe to trackers and folders: experiment, tags, params.

MLflow accepts experiments named `../../evil` or with NUL bytes, so names are checked here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from weighted_mtp_core.recipe.lines import KeyPath
from weighted_mtp_core.recipe.schema import NAME
from weighted_mtp_core.recipe.structure import Fault

_WRITTEN_BY_THE_RUN = re.compile(r"algo|model_version|wmtp\..*|mlflow\..*")
_TAG_KEY = re.compile(r"[A-Za-z0-9_./ -]+")  # what every MLflow store accepts


def name_faults(name: str, *, at: KeyPath) -> list[Fault]:
    """Find parts of an experiment's name that could not be a folder's name."""
    return [
        Fault(
            at,
            f"`{part}` cannot be part of an experiment's name: expected `{NAME}`, without `..`",
        )
        for part in name.split("/")
        if ".." in part or not re.fullmatch(NAME, part)
    ]


def own_pairs(tags: Sequence[str]) -> list[tuple[str, str]]:
    """Split the recipe's "key:value" tags; a value may hold further colons."""
    pairs = [tag.partition(":") for tag in tags]
    return [(key.strip(), value.strip()) for key, _, value in pairs]


def tag_faults(tags: Sequence[str]) -> list[Fault]:
    """Find tags that are no "key:value", or whose key is taken."""
    faults, seen = [], set()
    for i, (key, value) in enumerate(own_pairs(tags)):
        at: KeyPath = ("run", "tags", i)
        if not value or not _TAG_KEY.fullmatch(key):
            faults.append(Fault(at, f'expected "key:value", got {tags[i]!r}'))
        elif _WRITTEN_BY_THE_RUN.fullmatch(key):
            faults.append(Fault(at, f"tag `{key}` is written by the run itself; choose another key"))
        elif key in seen:
            faults.append(Fault(at, f"tag `{key}` is given twice"))
        seen.add(key)
    return faults


def flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield tables, and arrays of tables, as dotted keys; other values as text."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from flat(item, f"{key}.{i}")
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
