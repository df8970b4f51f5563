"""Read a recipe file into a `Recipe`, and write a resolved recipe back. Loads no plugin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tomli_w
from attrs import frozen

from weighted_mtp_core.recipe.credentials import credential_faults
from weighted_mtp_core.recipe.layers import Document, read_document
from weighted_mtp_core.recipe.schema import Recipe
from weighted_mtp_core.recipe.structure import Fault, plain, structure


@frozen(kw_only=True)
class LoadedRecipe:
    """A recipe and where its keys were written.

    Attributes:
        recipe: The tables; options of components are still as they were written.
        files: Every file read, lowest layer first.
        document: Finds the file and line of a key, for faults that only a component's options class can see.
    """

    recipe: Recipe
    files: tuple[str, ...]
    document: Document


def load_recipe(path: Path, *, preset: str | None = None, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe with all that it extends, the preset and the `--set` overrides on top.

    Raises:
        WmtpError: Lists every fault with file, line, key, what was expected and the nearest valid name.
    """
    document = read_document(path, preset=preset, overrides=overrides)
    recipe, faults = read_tables(document)
    if recipe is None:
        raise document.error(faults)
    return LoadedRecipe(recipe=recipe, files=tuple(document.files), document=document)


def read_tables(document: Document) -> tuple[Recipe | None, list[Fault]]:
    """Structure a document; the recipe, or everything that is wrong with what core knows of it."""
    recipe, faults = structure(Recipe, document.table)
    faults += credential_faults(document.table)
    return (None if faults else recipe), faults


def recipe_to_toml(recipe: Recipe) -> str:
    """Write a recipe with every default filled in; loading the text gives an equal recipe."""
    return tomli_w.dumps(plain(recipe))
