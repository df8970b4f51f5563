"""Read a recipe file into a `Recipe`, and write a resolved recipe. No plugin is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from weighted_mtp_core.recipe.document import Document
from weighted_mtp_core.recipe.layers import read_document
from weighted_mtp_core.recipe.line_numbers import KeyPath
from weighted_mtp_core.recipe.schema import Recipe
from weighted_mtp_core.recipe.structure import Fault, plain, shown, structure

_USER_AND_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s]*@")
_HINT = (
    "a recipe must not contain secrets: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
    "in the environment or in `.env`"
)


def load_recipe(path: Path, *, preset: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, merged with the files that it extends, the preset and the `--set` overrides.

    This function does not check the options of components; `make_plan` loads the plugins and checks them.

    Raises:
        WmtpError: A file cannot be read, the preset does not exist, an override is malformed, or the recipe
            is not valid; in the last case, the message lists every fault with its place.
    """
    document = read_document(path, preset=preset, overrides=overrides)
    recipe, faults = structure_recipe(document)
    if recipe is None:
        raise document.error(faults)
    return recipe


def structure_recipe(document: Document) -> tuple[Recipe | None, list[Fault]]:
    """Return the recipe and no faults, or None and all faults that can be found without loading plugins."""
    recipe, faults = structure(Recipe, document.table)
    faults += credential_faults(document.table)
    return (None if faults else recipe), faults


def credential_faults(value: Any, *, at: KeyPath = ()) -> list[Fault]:
    """Return a fault for every `scheme://user:password@host` below `value`, without showing the password."""
    if isinstance(value, str) and _USER_AND_PASSWORD.search(value):
        return [Fault(at, f"contains a user name and password: {shown(value)}", hint=_HINT)]
    if isinstance(value, list):
        value = dict(enumerate(value))
    items = value.items() if isinstance(value, Mapping) else ()
    return [fault for key, item in items for fault in credential_faults(item, at=(*at, key))]


def recipe_to_toml(recipe: Recipe) -> str:
    """Return a recipe as TOML text with defaults filled in; loading the text gives an equal recipe."""
    return tomli_w.dumps(plain(recipe))
