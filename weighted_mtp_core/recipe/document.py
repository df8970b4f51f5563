"""The table that results from merging the layers of a recipe, with the origin of each key.

Later layers override earlier layers. Tables are merged key by key; arrays and other values are replaced. If a
layer selects another component with `use`, the options of the previous component are discarded. If a layer
gives the length of a stage in epochs, a number of steps from earlier layers is discarded, and vice versa.
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
_LENGTHS = {"steps", "epochs"}
"""Two keys of a table `train`; a recipe gives only one of them."""


@define
class Document:
    """The merged table of a recipe, before its keys and values are checked.

    Attributes:
        name: The path of the recipe, as the user gave it.
        table: The table that results from merging all layers.
        texts: The text of every file that was read, keyed by path, lowest layer first.
    """

    name: str
    table: Table = field(factory=dict)
    texts: dict[str, str] = field(factory=dict)
    _sources: dict[KeyPath, str] = field(factory=dict)

    @property
    def files(self) -> list[str]:
        """The paths of all files that were read, lowest layer first."""
        return list(self.texts)

    def add(self, table: Table, *, file: str, text: str) -> None:
        """Merge a file as the highest layer.

        Args:
            table: The table of the file; the caller leaves out tables of a preset that would add or replace a
                component.
            file: The path of the file.
            text: The text of the file, from which the line numbers of keys are determined.
        """
        self._merge(self.table, table, file, at=())
        self.texts[file] = text

    def set(self, keys: Sequence[str], value: Any, *, source: str) -> None:
        """Set one value in the highest layer; missing tables on the path to the key are created.

        Raises:
            WmtpError: The path leads through a value that is neither a table nor an array, or contains a key
                that is not an index of the array to which it belongs.
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
        """Return where a key was set: "file, line 3, a.key" or "--set, a.key".

        If the key was not set, return where the nearest enclosing table was set, or else the recipe's path.
        """
        source, line = self._origin(path)
        return ", ".join([source, *([f"line {line}"] if line else []), dotted(path)])

    def error(self, faults: Sequence[Fault]) -> WmtpError:
        """Return one error that lists every fault with its place; faults in the recipe itself come first."""
        ordered = sorted(dict.fromkeys(faults), key=self._order)
        # the first line of the error already names the recipe's own file
        lines = [
            f"  {self.locate(each.path).removeprefix(self.name + ', ')}: {each.text}" for each in ordered
        ]
        count = f"{len(lines)} problem{'s' * (len(lines) > 1)}"
        hints = [hint for fault in ordered if (hint := fault.hint or self._quoting_hint(fault))]
        return WmtpError("\n".join([f"{self.name}: {count}", *lines]), hint=next(iter(hints), None))

    def _quoting_hint(self, fault: Fault) -> str | None:
        """Return a hint on how to quote a string that TOML reads as another type; None for other faults."""
        if self._origin(fault.path)[0] != "--set" or not fault.text.startswith("expected str, got"):
            return None
        return f"a text that looks like another value needs quotes: --set '{dotted(fault.path)}=\"...\"'"

    def _merge(self, old: Table, new: Table, source: str, *, at: KeyPath) -> None:
        if "use" in old and "use" in new and old["use"] != new["use"]:
            old.pop("options", None)
            self._forget((*at, "options"))
        if at[-1:] == ("train",) and len(given := _LENGTHS & new.keys()) == 1:
            for key in _LENGTHS - given:
                old.pop(key, None)
                self._forget((*at, key))
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
        """Return where a key was set, as (file, line) or (command-line option, 0).

        If the key was not set, return where the nearest enclosing table was set.
        """
        while path and path not in self._sources:
            path = path[:-1]
        source = self._sources.get(path, self.name)
        return source, find_lines(self.texts.get(source, "")).get(path, 0)

    def _order(self, fault: Fault) -> tuple[int, int, str]:
        """Return a sort key: first faults in the recipe, then faults in other files, then in `--set`."""
        source, line = self._origin(fault.path)
        layer = self.files.index(source) if source in self.texts else len(self.texts)
        return -1 if source == self.name else layer, line, dotted(fault.path)


def dotted(path: Sequence[str | int]) -> str:
    """Return a path of keys and indices as text, such as `a.0.b`."""
    return ".".join(str(each) for each in path)


def _index(parent: Any, key: str, *, at: KeyPath, source: str) -> str | int:
    """Convert `key` to a key of `parent` if it is a table, or to an index if it is an array."""
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
