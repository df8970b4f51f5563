"""Read the layers of a recipe in this order: the files in `extends`, the recipe, the preset, `--set`."""

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

PRESETS = Path("configs/presets")


def read_document(
    path: Path, *, preset: str | None = None, overrides: Sequence[str] = (), run_name: str | None = None
) -> Document:
    """Read a recipe and merge its layers.

    Raises:
        WmtpError: A file is missing, is not TOML or extends itself; the preset or an override is unknown.
    """
    document = Document(name=str(path))
    _add_file(document, path)
    if preset is not None:
        _add_file(document, _find_preset(preset, beside=path), is_preset=True)
    for keys, value in parse_overrides(overrides):
        document.set(keys, value, source="--set")
    if run_name is not None:
        document.set(("run", "name"), run_name, source="--run-name")
    return document


def _add_file(
    document: Document, path: Path, *, extended_by: tuple[Path, ...] = (), is_preset: bool = False
) -> None:
    if path.resolve() in [each.resolve() for each in extended_by]:
        chain = " -> ".join(f"`{each}`" for each in (*extended_by, path))
        raise WmtpError(f"recipes extend each other in a circle: {chain}")
    text = _read(path, extended_by=extended_by)
    try:
        table = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise WmtpError(f"{path}: not valid TOML: {error}") from error
    bases = table.pop("extends", [])
    if not (isinstance(bases, list) and all(isinstance(name, str) for name in bases)):
        line = find_lines(text)["extends",]
        raise WmtpError(f"{path}: line {line}, extends: expected array of str, got {shown(bases)}")
    for name in bases:
        # normpath shortens `a/../b`, so that messages show the path that a person would write
        base = Path(os.path.normpath(path.parent / name))
        if base.resolve() in [Path(file).resolve() for file in document.files]:
            continue  # an earlier file already extends this base, which must not override that file
        _add_file(document, base, extended_by=(*extended_by, path), is_preset=is_preset)
    if is_preset:
        table = {key: value for key, value in table.items() if _preset_applies(document, key, value)}
    document.add(table, file=str(path), text=text)


def _preset_applies(document: Document, key: str, table: Any) -> bool:
    """Return whether a preset's table changes a table of the recipe instead of adding another component."""
    recipe = document.table.get(key)
    if key == "critic" and recipe is None:
        return False
    used = recipe.get("use") if isinstance(recipe, dict) else None
    return not isinstance(table, dict) or table.get("use", used) == used


def _read(path: Path, *, extended_by: tuple[Path, ...]) -> str:
    try:
        return read_utf8(path)
    except FileNotFoundError:
        beside = sorted(each.name for each in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        named_by = f", which `{extended_by[-1]}` extends" if extended_by else ""
        near = did_you_mean(path.name, beside)
        others = f"`{path.parent}` holds {quoted(beside)}" if beside else None
        raise WmtpError(f"there is no recipe `{path}`{named_by}", hint=near or others) from None
    except OSError as error:
        raise WmtpError(f"cannot read the recipe `{path}`: {error.strerror}") from error


def _find_preset(name: str, *, beside: Path) -> Path:
    found: dict[str, Path] = {}
    for folder in (PRESETS, beside.parent / "presets"):  # presets next to the recipe override core's
        found |= {file.stem: file for file in sorted(folder.glob("*.toml"))}
    if name in found:
        return found[name]
    available = f"available: {quoted(sorted(found))}" if found else "none are available"
    hint = did_you_mean(name, found) or f"presets are files like `{beside.parent / 'presets' / 'NAME.toml'}`"
    raise WmtpError(f"there is no preset `{name}`; {available}", hint=hint)
