"""Check names that become folders, expand `~` in paths, and flatten tables to dotted keys.

MLflow itself accepts experiment names such as `../../evil` and names with NUL bytes, so core checks names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def check_path(name: str) -> None:
    """Check a name such as `team/a`; each part of the name becomes a folder.

    Raises:
        ValueError: A part of the name is not a valid folder name.
    """
    for part in name.split("/"):
        if ".." in part or not re.fullmatch(NAME, part):
            raise ValueError(f"each part of {name!r} must match `{NAME}`, without `..`; {part!r} does not")


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


def expand_home(path: str) -> str:
    """Replace `~` or `~user` at the beginning of a path with the home folder of the user.

    Raises:
        ValueError: There is no user with this name.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        user = path.partition("/")[0]
        raise ValueError(f"there is no user `{user}`; a folder of this name is `./{user}`") from error
