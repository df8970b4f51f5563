"""Read a recipe file into a `Recipe`, and write a resolved recipe. No plugin is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tomli_w

from weighted_mtp_core.recipe.credentials import credential_faults
from weighted_mtp_core.recipe.document import Document
from weighted_mtp_core.recipe.layers import read_document
from weighted_mtp_core.recipe.schema import Recipe
from weighted_mtp_core.recipe.structure import Fault, plain, structure


def load_recipe(path: Path, *, preset: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with the files that it extends, the preset and the `--set` overrides on top.

    The options of components stay as written: only `make_plan` loads the plugins that check them.

    Raises:
        WmtpError: Lists every fault with file, line, key, expected value and the nearest valid name.
    """
    document = read_document(path, preset=preset, overrides=overrides)
    recipe, faults = structure_recipe(document)
    if recipe is None:
        raise document.error(faults)
    return recipe


def structure_recipe(document: Document) -> tuple[Recipe | None, list[Fault]]:
    """Return the recipe, or None and every fault that can be found without plugins."""
    recipe, faults = structure(Recipe, document.table)
    faults += credential_faults(document.table)
    return (None if faults else recipe), faults


def recipe_to_toml(recipe: Recipe) -> str:
    """Write a recipe with every default filled in; loading the text gives an equal recipe."""
    return tomli_w.dumps(plain(recipe))
