"""Read a recipe's layers in this order: files in `extends`, recipe, preset, `--set`, `--run-name`."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import did_you_mean, quoted
from weighted_mtp_core.recipe.document import Document
from weighted_mtp_core.recipe.line_numbers import find_lines
from weighted_mtp_core.recipe.overrides import parse_overrides
from weighted_mtp_core.recipe.structure import shown
from weighted_mtp_core.text_files import read_utf8

FOLDER = Path(__file__).parent
"""The folder of core's TOML files: `core:presets/ci.toml` is the file `presets/ci.toml` in this folder."""


def core_files() -> dict[str, Path]:
    """Return the TOML files of core, keyed by their names in `extends`, such as `core:defaults.toml`."""
    return {f"core:{file.relative_to(FOLDER).as_posix()}": file for file in sorted(FOLDER.rglob("*.toml"))}


def defaults(*, name: str) -> Document:
    """Return a document that contains only `core:defaults.toml`; error messages call the document `name`."""
    document = Document(name=name)
    _add_file(document, "core:defaults.toml")
    return document


def read_document(
    path: Path, *, preset: str | None = None, overrides: Sequence[str] = (), run_name: str | None = None
) -> Document:
    """Read a recipe and merge its layers.

    Raises:
        WmtpError: A file is missing, cannot be read, is not TOML or extends itself; the preset does not
            exist; or an override is malformed or does not fit the recipe.
    """
    document = Document(name=str(path))
    _add_file(document, str(path))
    if preset is not None:
        _add_file(document, _find_preset(preset, beside=path), is_preset=True)
    for keys, value in parse_overrides(overrides):
        document.set(keys, value, source="--set")
    if run_name is not None:
        document.set(("run", "name"), run_name, source="--run-name")
    return document


def _add_file(
    document: Document, name: str, *, extended_by: tuple[str, ...] = (), is_preset: bool = False
) -> None:
    if _path(name).resolve() in [_path(each).resolve() for each in extended_by]:
        chain = " -> ".join(f"`{each}`" for each in (*extended_by, name))
        raise WmtpError(f"recipes extend each other in a circle: {chain}")
    text = _read(name, extended_by=extended_by)
    try:
        table = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise WmtpError(f"{name}: not valid TOML: {error}") from error
    bases = table.pop("extends", [])
    if not (isinstance(bases, list) and all(isinstance(each, str) for each in bases)):
        line = find_lines(text)["extends",]
        raise WmtpError(f"{name}: line {line}, extends: expected array of str, got {shown(bases)}")
    for each in bases:
        # normpath shortens `a/../b` to `b`, so that messages show the path that a person would write
        base = each if each.startswith("core:") else os.path.normpath(Path(name).parent / each)
        if _path(base).resolve() in [_path(file).resolve() for file in document.files]:
            continue  # an earlier file already extends this base, so the base must not override that file
        _add_file(document, base, extended_by=(*extended_by, name), is_preset=is_preset)
    if is_preset:
        table = {key: value for key, value in table.items() if _preset_applies(document, key, value)}
    document.add(table, file=name, text=text)


def _path(name: str) -> Path:
    """Return the path of a file that is given as `core:NAME` or as a path."""
    return core_files().get(name, Path(name))


def _preset_applies(document: Document, key: str, table: Any) -> bool:
    """Return whether a preset's table applies; it does not if it would add or replace a component."""
    recipe = document.table.get(key)
    if key == "critic" and recipe is None:
        return False
    used = recipe.get("use") if isinstance(recipe, dict) else None
    return not isinstance(table, dict) or table.get("use", used) == used


def _read(name: str, *, extended_by: tuple[str, ...]) -> str:
    path = _path(name)
    try:
        return read_utf8(path)
    except FileNotFoundError:
        beside = sorted(each.name for each in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        others = [f"`{path.parent}` holds {quoted(beside)}"] if beside else []
        named_by = ""
        if extended_by:
            named_by = f", which `{extended_by[-1]}` extends"
            others.append(f"core holds {quoted(core_files())}")
            beside += core_files()
        near = did_you_mean(name if name.startswith("core:") else path.name, beside)
        raise WmtpError(
            f"there is no recipe `{name}`{named_by}", hint=near or "; ".join(others) or None
        ) from None
    except OSError as error:
        raise WmtpError(f"cannot read the recipe `{name}`: {error.strerror}") from error


def _find_preset(name: str, *, beside: Path) -> str:
    core = [each for each in core_files() if each.startswith("core:presets/")]
    own = map(str, sorted((beside.parent / "presets").glob("*.toml")))  # they override core's presets
    found = {Path(each).stem: each for each in (*core, *own)}
    if name in found:
        return found[name]
    hint = did_you_mean(name, found) or f"presets are files like `{beside.parent / 'presets' / 'NAME.toml'}`"
    raise WmtpError(f"there is no preset `{name}`; available: {quoted(sorted(found))}", hint=hint)
