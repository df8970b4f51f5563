"""One table merged from the layers of a recipe, with the origin of each key.

Later layers win. Tables merge key by key; arrays and values are replaced. A layer that names another
component with `use` discards the options of the old one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import define, field, frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.recipe.describe import shown
from weighted_mtp_core.recipe.line_numbers import KeyPath
from weighted_mtp_core.recipe.structure import Fault

Table = dict[str, Any]


@frozen
class Origin:
    """Where a key was written: a file and a line, or an option such as `--set`."""

    source: str
    line: int | None = None


@define
class Document:
    """The merged table of a recipe, before it is checked.

    Attributes:
        name: The recipe's path as the user gave it.
        table: The merged layers.
        files: Every file read, lowest layer first.
    """

    name: str
    table: Table = field(factory=dict)
    files: list[str] = field(factory=list)
    _origins: dict[KeyPath, Origin] = field(factory=dict)

    def add(self, table: Table, origins: Mapping[KeyPath, Origin]) -> None:
        """Merge a layer on top."""
        self._merge(self.table, table, origins, at=())

    def set(self, keys: Sequence[str], value: Any, *, source: str) -> None:
        """Set one value on top; missing tables on the way to it are created.

        Raises:
            WmtpError: The keys lead through a value that is no table, or past the end of an array.
        """
        parent: Any = self.table
        at: KeyPath = ()
        for key in keys[:-1]:
            step = _index(parent, key, at=at, source=source)
            if isinstance(parent, dict) and step not in parent:
                parent[key] = {}
                self._origins[*at, step] = Origin(source)
            parent, at = parent[step], (*at, step)
        step = _index(parent, keys[-1], at=at, source=source)
        if isinstance(parent, dict):
            self._merge(parent, {str(step): value}, {(*at, step): Origin(source)}, at=at)
        else:
            self._forget((*at, step))
            parent[step] = value
            self._origins[*at, step] = Origin(source)

    def locate(self, path: KeyPath) -> str:
        """Return "file, line 3, a.key" or "--set, a.key": what wrote the key or the table around it."""
        origin = self._origin(path)
        line = [] if origin.line is None else [f"line {origin.line}"]
        return ", ".join([origin.source, *line, dotted(path)])

    def error(self, faults: Sequence[Fault]) -> WmtpError:
        """Return one error that lists every fault with its origin, in the order of the files."""
        ordered = sorted(dict.fromkeys(faults), key=self._order)
        # the first line names the recipe's own file
        lines = [
            f"  {self.locate(each.path).removeprefix(self.name + ', ')}: {each.text}" for each in ordered
        ]
        count = f"{len(lines)} problem{'s' * (len(lines) > 1)}"
        hints = [hint for fault in ordered if (hint := fault.hint or self._quoting_hint(fault))]
        return WmtpError("\n".join([f"{self.name}: {count}", *lines]), hint=next(iter(hints), None))

    def _quoting_hint(self, fault: Fault) -> str | None:
        """Return how to pass a text that is also TOML of another type, as in `--set run.name=123`."""
        if self._origin(fault.path).source != "--set" or not fault.text.startswith("expected str, got"):
            return None
        return f"a text that looks like another value needs quotes: --set '{dotted(fault.path)}=\"...\"'"

    def _merge(self, old: Table, new: Table, origins: Mapping[KeyPath, Origin], *, at: KeyPath) -> None:
        if "use" in old and "use" in new and old["use"] != new["use"]:
            old.pop("options", None)
            self._forget((*at, "options"))
        for key, value in new.items():
            path = (*at, key)
            if isinstance(value, dict) and isinstance(old.get(key), dict):
                self._merge(old[key], value, origins, at=path)
            else:
                self._forget(path)
                old[key] = copy.deepcopy(value)
                self._origins |= {p: origin for p, origin in origins.items() if p[: len(path)] == path}
            if path in origins:
                self._origins[path] = origins[path]

    def _forget(self, path: KeyPath) -> None:
        for below in [p for p in self._origins if p[: len(path)] == path]:
            del self._origins[below]

    def _origin(self, path: KeyPath) -> Origin:
        """Return the origin of a key, or of the nearest table around it that a layer wrote."""
        written = (path[:n] for n in range(len(path), 0, -1) if path[:n] in self._origins)
        return next((self._origins[each] for each in written), Origin(self.name))

    def _order(self, fault: Fault) -> tuple[int, int, str]:
        """Sort faults of the recipe itself first, then of the lower layers, then of options, each by line."""
        origin = self._origin(fault.path)
        layer = self.files.index(origin.source) if origin.source in self.files else len(self.files)
        return -1 if origin.source == self.name else layer, origin.line or 0, dotted(fault.path)


def dotted(path: Sequence[str | int]) -> str:
    """Return `a.0.b`."""
    return ".".join(str(each) for each in path)


def _index(parent: Any, key: str, *, at: KeyPath, source: str) -> str | int:
    """Return what `key` selects in `parent`: a key of a table, or the index of an array's element."""
    if isinstance(parent, dict):
        return key
    name = dotted(at)
    if not isinstance(parent, list):
        raise WmtpError(f"{source} {name}.{key}: `{name}` is not a table but {shown(parent)}")
    if key.isdecimal() and int(key) < len(parent):
        return int(key)
    raise WmtpError(
        f"{source} {name}.{key}: `{name}` is an array of {len(parent)}",
        hint=f"its elements are numbered from 0; to replace the whole array: --set '{name}=[...]'",
    )
