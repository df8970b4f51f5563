"""One table merged from the layers of a recipe, with the origin of each key.

Later layers win. Tables merge key by key; arrays and values are replaced. A layer that names another
component with `use` discards the options of the old one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from attrs import define, field

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.recipe.line_numbers import KeyPath, find_lines, key_paths
from weighted_mtp_core.recipe.structure import Fault, shown

Table = dict[str, Any]


@define
class Document:
    """The merged table of a recipe, before it is checked.

    Attributes:
        name: The recipe's path as the user gave it.
        table: The merged layers.
        texts: The text of every file read, lowest layer first.
    """

    name: str
    table: Table = field(factory=dict)
    texts: dict[str, str] = field(factory=dict)
    _sources: dict[KeyPath, str] = field(factory=dict)

    @property
    def files(self) -> list[str]:
        """Every file read, lowest layer first."""
        return list(self.texts)

    def add(self, table: Table, *, file: str, text: str) -> None:
        """Merge a file on top; `table` holds what counts of its text."""
        self._merge(self.table, table, file, at=())
        self.texts[file] = text

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
                self._sources[*at, step] = source
            parent, at = parent[step], (*at, step)
        step = _index(parent, keys[-1], at=at, source=source)
        if isinstance(parent, dict):
            self._merge(parent, {str(step): value}, source, at=at)
        else:
            self._forget((*at, step))
            parent[step] = value
            self._sources[*at, step] = source

    def locate(self, path: KeyPath) -> str:
        """Return "file, line 3, a.key" or "--set, a.key": what wrote the key or the table around it."""
        source, line = self._origin(path)
        return ", ".join([source, *([f"line {line}"] if line else []), dotted(path)])

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
        if self._origin(fault.path)[0] != "--set" or not fault.text.startswith("expected str, got"):
            return None
        return f"a text that looks like another value needs quotes: --set '{dotted(fault.path)}=\"...\"'"

    def _merge(self, old: Table, new: Table, source: str, *, at: KeyPath) -> None:
        if "use" in old and "use" in new and old["use"] != new["use"]:
            old.pop("options", None)
            self._forget((*at, "options"))
        for key, value in new.items():
            path = (*at, key)
            if isinstance(value, dict) and isinstance(old.get(key), dict):
                self._merge(old[key], value, source, at=path)
            else:
                self._forget(path)
                old[key] = copy.deepcopy(value)
                self._sources |= dict.fromkeys(key_paths(value, path), source)
            self._sources[path] = source

    def _forget(self, path: KeyPath) -> None:
        for below in [p for p in self._sources if p[: len(path)] == path]:
            del self._sources[below]

    def _origin(self, path: KeyPath) -> tuple[str, int]:
        """Return the file or option, and the line or 0, of a key or of the nearest table around it."""
        while path and path not in self._sources:
            path = path[:-1]
        source = self._sources.get(path, self.name)
        return source, find_lines(self.texts.get(source, "")).get(path, 0)

    def _order(self, fault: Fault) -> tuple[int, int, str]:
        """Sort faults of the recipe itself first, then of the lower layers, then of options, each by line."""
        source, line = self._origin(fault.path)
        layer = self.files.index(source) if source in self.texts else len(self.texts)
        return -1 if source == self.name else layer, line, dotted(fault.path)


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
