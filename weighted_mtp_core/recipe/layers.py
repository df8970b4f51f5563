"""Stack a recipe's files, preset and `--set` into one table that remembers where each key came from.

Later layers win: the files named by `extends` (in order), the recipe, the preset, then `--set`. Tables merge
key by key; arrays and values replace. A layer whose `use` names another component leaves the options written
for the old one behind: they belong to that component.
"""

from __future__ import annotations

import copy
import os.path
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli
from attrs import define, field, frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import did_you_mean, quoted
from weighted_mtp_core.recipe.describe import shown
from weighted_mtp_core.recipe.lines import KeyPath, find_lines
from weighted_mtp_core.recipe.structure import Fault

PRESETS = Path("configs/presets")
Table = dict[str, Any]


@frozen
class Place:
    """Where a key was written: a file and a line, or `--set`."""

    source: str
    line: int | None = None

    def name_key(self, path: KeyPath) -> str:
        """Return "file, line 3, a.key" or "--set, a.key"."""
        line = [] if self.line is None else [f"line {self.line}"]
        return ", ".join([self.source, *line, _dotted(path)])


@define
class Document:
    """The merged table of a recipe, before anything in it is believed.

    Attributes:
        name: The recipe's path as the user gave it.
        table: What all layers together say.
        files: Every file read, lowest layer first.
    """

    name: str
    table: Table = field(factory=dict)
    files: list[str] = field(factory=list)
    _places: dict[KeyPath, Place] = field(factory=dict)

    def where(self, path: KeyPath) -> str:
        """Return a key with the file and line, or the option, that wrote it or the table around it."""
        place = self._place(path)
        return place.name_key(path) if place else f"{self.name}, {_dotted(path)}"

    def _place(self, path: KeyPath) -> Place | None:
        """Return the place of a key, or of the nearest table around it that anybody wrote."""
        written = (path[:n] for n in range(len(path), 0, -1) if path[:n] in self._places)
        return next((self._places[each] for each in written), None)

    def error(self, faults: Sequence[Fault]) -> WmtpError:
        """Return one error that lists every fault with its place, in the order of the files."""
        ordered = sorted(dict.fromkeys(faults), key=self._order)
        # the file that the first line names goes without saying
        lines = [f"  {self.where(each.path).removeprefix(self.name + ', ')}: {each.text}" for each in ordered]
        count = f"{len(lines)} problem{'s' * (len(lines) > 1)}"
        hints = [fault.hint for fault in ordered if fault.hint]
        return WmtpError("\n".join([f"{self.name}: {count}", *lines]), hint=next(iter(hints), None))

    def add(self, table: Table, places: Mapping[KeyPath, Place]) -> None:
        """Put a layer on top."""
        self._merge(self.table, table, places, at=())

    def speaks_of(self, table: Table) -> Table:
        """Return a layer without its tables that name another component than the one in use."""
        return {
            key: value
            for key, value in table.items()
            if not (isinstance(value, dict) and "use" in value and self._used(key) != value["use"])
        }

    def _used(self, key: str) -> Any:
        table = self.table.get(key)
        return table.get("use") if isinstance(table, dict) else None

    def drop_unnamed(self, key: str) -> None:
        """Drop a table that names no component: a preset changes the parts a recipe has, it adds none."""
        table = self.table.get(key)
        if isinstance(table, dict) and "use" not in table:
            del self.table[key]
            self._forget((key,))

    def set(self, keys: Sequence[str], value: Any, *, source: str) -> None:
        """Put one value on top; tables on the way to it are made if they are missing.

        Raises:
            WmtpError: The keys lead through a value, or past the end of an array.
        """
        parent: Any = self.table
        at: KeyPath = ()
        for key in keys[:-1]:
            step = _step(parent, key, at=at, source=source)
            if isinstance(parent, dict) and step not in parent:
                parent[key] = {}
                self._places[*at, step] = Place(source)
            parent, at = parent[step], (*at, step)
        step = _step(parent, keys[-1], at=at, source=source)
        if isinstance(parent, dict):
            self._merge(parent, {str(step): value}, {(*at, step): Place(source)}, at=at)
        else:
            self._forget((*at, step))
            parent[step] = value
            self._places[*at, step] = Place(source)

    def _merge(self, old: Table, new: Table, places: Mapping[KeyPath, Place], *, at: KeyPath) -> None:
        if "use" in old and "use" in new and old["use"] != new["use"]:
            old.pop("options", None)
            self._forget((*at, "options"))
        for key, value in new.items():
            path = (*at, key)
            if isinstance(value, dict) and isinstance(old.get(key), dict):
                self._merge(old[key], value, places, at=path)
            else:
                self._forget(path)
                old[key] = copy.deepcopy(value)
                self._places.update({p: place for p, place in places.items() if p[: len(path)] == path})
            if path in places:
                self._places[path] = places[path]

    def _forget(self, path: KeyPath) -> None:
        for below in [p for p in self._places if p[: len(path)] == path]:
            del self._places[below]

    def _order(self, fault: Fault) -> tuple[int, int, str]:
        """Sort the recipe's own faults first, then lower layers, then options, each by line."""
        place = self._place(fault.path) or Place(self.name, 0)
        layer = self.files.index(place.source) if place.source in self.files else len(self.files)
        return -1 if place.source == self.name else layer, place.line or 0, _dotted(fault.path)


def read_document(
    path: Path, *, preset: str | None = None, overrides: Sequence[str] = (), run_name: str | None = None
) -> Document:
    """Read a recipe and all that it extends.

    Raises:
        WmtpError: A file is missing, is no TOML or extends itself; the preset or an override is unknown.
    """
    document = Document(name=str(path))
    _add_file(document, path, reached_from=())
    if preset is not None:
        has_critic = "critic" in document.table
        _add_file(document, _find_preset(preset, beside=path), reached_from=(), is_preset=True)
        if not has_critic:
            document.drop_unnamed("critic")
    parsed = [_parse_override(text) for text in overrides]
    # A new `use` drops the options of the old one, so it must not drop what the same command line sets.
    for keys, value in sorted(parsed, key=lambda each: each[0][-1] != "use"):
        document.set(keys, value, source="--set")
    if run_name is not None:
        document.set(("run", "name"), run_name, source="--run-name")
    return document


def _add_file(
    document: Document, path: Path, *, reached_from: tuple[Path, ...], is_preset: bool = False
) -> None:
    if path.resolve() in [each.resolve() for each in reached_from]:
        chain = " -> ".join(f"`{each}`" for each in (*reached_from, path))
        raise WmtpError(f"recipes extend each other in a circle: {chain}")
    text = _read(path, reached_from=reached_from)
    try:
        table = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise WmtpError(f"{path}: not valid TOML: {error}") from error
    places = {keys: Place(str(path), line) for keys, line in find_lines(text).items()}
    base_names = table.pop("extends", [])
    if not (isinstance(base_names, list) and all(isinstance(name, str) for name in base_names)):
        line = places["extends",].line
        raise WmtpError(f"{path}: line {line}, extends: expected array of str, got {shown(base_names)}")
    for name in base_names:
        # normpath folds `a/../b`: messages show the path that a person would write
        _add_file(document, Path(os.path.normpath(path.parent / name)), reached_from=(*reached_from, path))
    if is_preset:
        table = document.speaks_of(table)
    document.add(table, {keys: place for keys, place in places.items() if keys[0] in table})
    document.files.append(str(path))


def _read(path: Path, *, reached_from: tuple[Path, ...]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(each.name for each in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        named_by = f", which `{reached_from[-1]}` extends" if reached_from else ""
        near = did_you_mean(path.name, beside)
        there = f"`{path.parent}` holds {quoted(beside)}" if beside else None
        raise WmtpError(f"there is no recipe `{path}`{named_by}", hint=near or there) from None
    except (OSError, UnicodeDecodeError) as error:
        raise WmtpError(f"cannot read the recipe `{path}`: {error}") from error


def _find_preset(name: str, *, beside: Path) -> Path:
    found: dict[str, Path] = {}
    for folder in (PRESETS, beside.parent / "presets"):  # the recipe's own presets win
        found |= {file.stem: file for file in sorted(folder.glob("*.toml"))}
    if name in found:
        return found[name]
    available = f"available: {quoted(sorted(found))}" if found else "none are available"
    hint = did_you_mean(name, found) or f"presets are files like `{beside.parent / 'presets' / 'NAME.toml'}`"
    raise WmtpError(f"there is no preset `{name}`; {available}", hint=hint)


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, equals, raw = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(re.fullmatch(r"[A-Za-z0-9_-]+", each) for each in keys):
        example = "write --set KEY=VALUE, for example: --set train.steps=50"
        raise WmtpError(f"cannot read `--set {text}`", hint=example)
    return keys, _parse_value(raw.strip(), text=text)


def _parse_value(raw: str, *, text: str) -> Any:
    """Read a TOML value; what is no TOML is a string, so that `--set model.base=micro` needs no quotes."""
    try:
        table = tomli.loads(f"value = {raw}")
    except tomli.TOMLDecodeError as error:
        if raw[:1] in {'"', "'", "[", "{"}:
            raise WmtpError(f"cannot read the value in `--set {text}`: {error}") from error
        return raw
    return table["value"] if len(table) == 1 else raw


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def _step(parent: Any, key: str, *, at: KeyPath, source: str) -> str | int:
    """Return `key` as what `parent` is indexed by: a name, or a number in an array."""
    if isinstance(parent, dict):
        return key
    name = _dotted(at)
    if not isinstance(parent, list):
        raise WmtpError(f"{source} {name}.{key}: `{name}` is no table but {shown(parent)}")
    if key.isdecimal() and int(key) < len(parent):
        return int(key)
    raise WmtpError(
        f"{source} {name}.{key}: `{name}` is an array of {len(parent)}",
        hint=f"its elements are numbered from 0; to replace the whole array: --set '{name}=[...]'",
    )
