"""The option `--grid KEY=VALUE,VALUE`, which makes an arm of a recipe for each value of a key.

If the option is repeated, there is an arm for each combination of the values.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
from attrs import frozen

from weighted_mtp_core import run_tags
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import did_you_mean
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.recipe.overrides import parse_override

_OWN_KEYS = {"run.seed": "use --seeds N", "run.name": "names follow from the values", "run.tags": None}


@frozen(kw_only=True)
class Grid:
    """A key of recipes, and the values that it gets in different arms, as text in the syntax of `--set`."""

    key: str
    values: tuple[str, ...]


def parse_grids(texts: Sequence[str]) -> tuple[Grid, ...]:
    """Parse the values of `--grid`, for example `weighting.options.clip=[0,2],[0,3]`.

    Raises:
        WmtpError: A text does not have the form KEY=VALUE,VALUE; a value cannot be parsed or is repeated; or
            a key is repeated or cannot differ between arms.
    """
    grids = tuple(map(_parse_grid, texts))
    keys = [grid.key for grid in grids]
    for text, key in zip(texts, keys, strict=True):
        if key in _OWN_KEYS:
            raise WmtpError(f"`--grid {text}`: `{key}` cannot be a grid", hint=_OWN_KEYS[key])
        if keys.count(key) > 1:
            raise WmtpError(f"`--grid {text}`: `{key}` is given twice", hint="write all values after one key")
    return grids


def _parse_grid(text: str) -> Grid:
    key, _, joined = text.partition("=")
    values: list[str] = []
    parsed = []
    part = ""
    for piece in joined.split(","):
        part = f"{part},{piece}" if part else piece
        try:
            _, value = parse_override(f"{key}={part}")
        except WmtpError:  # the comma is inside a string, an array or a table
            continue
        values.append(part.strip())
        parsed.append(value)
        part = ""
    if part or not all(values):
        raise WmtpError(
            f"cannot read `--grid {text}`", hint="write KEY=VALUE,VALUE, for example: train.steps=100,200"
        )
    if any(value in parsed[:number] for number, value in enumerate(parsed)):
        raise WmtpError(f"`--grid {text}`: a value is repeated")
    return Grid(key=key.strip(), values=tuple(values))


def refuse_unknown_keys(grids: Sequence[Grid], plans: Sequence[Plan]) -> None:
    """Refuse a grid whose key none of the recipes has.

    Raises:
        WmtpError: None of the plans has the key of a grid.
    """
    for grid in grids:
        if not any(_has(plan, grid.key) for plan in plans):
            known = sorted({key for plan in plans for key in plan.params})
            raise WmtpError(
                f"`--grid {grid.key}=...`: no recipe has the key `{grid.key}`",
                hint=did_you_mean(grid.key, known) or "see: check RECIPE --resolved",
            )


def arms_of_grids(plan: Plan, grids: Sequence[Grid]) -> Iterator[tuple[str, ...]]:
    """Yield the overrides of each arm that the grids make of a recipe.

    The name of an arm is the recipe's `run.name`, followed for each key by the key's last part and the value,
    such as `mine-power-2`. If the last parts of two keys are equal, the whole keys are used. A recipe that
    has none of the grids' keys becomes a single arm without overrides.
    """
    own = [grid for grid in grids if _has(plan, grid.key)]
    for values in itertools.product(*(grid.values for grid in own)):
        point = {grid.key: value for grid, value in zip(own, values, strict=True)}
        if not point:
            yield ()
            return
        table = plan.recipe.run
        name = "-".join([table.name, *(f"{_short(key, grids)}-{_slug(point[key])}" for key in point)])
        tags = [*table.tags, *(f"{run_tags.GRID_PREFIX}{key}:{value}" for key, value in point.items())]
        yield (
            *(f"{key}={value}" for key, value in point.items()),
            f"run.name={json.dumps(name)}",
            f"run.tags={json.dumps(tags)}",
        )


def _has(plan: Plan, key: str) -> bool:
    """Return whether a plan's recipe may contain a key or a table of this name, even if it is not set."""
    if any(each == key or each.startswith(f"{key}.") for each in plan.params):
        return True
    first, *rest = key.split(".")
    node: Any = plan.recipe
    component = {"weighting": plan.weighting, "data": plan.data, "critic": plan.critic}.get(first)
    if component is not None and rest[:1] == ["options"]:
        node, (_, *rest) = component.options, rest
    else:
        rest = [first, *rest]
    for part in rest:
        names = {a.alias: a.name for a in attrs.fields(type(node))} if attrs.has(type(node)) else {}
        if part not in names:
            return False
        node = getattr(node, names[part])
    return True


def _short(key: str, grids: Sequence[Grid]) -> str:
    """Return the last part of a key, or the whole key if the last parts of two keys are equal."""
    last = key.rpartition(".")[2]
    return last if [grid.key.rpartition(".")[2] for grid in grids].count(last) == 1 else key


def _slug(value: str) -> str:
    """Convert a value to a text that may occur in a folder name: `[0, 2]` becomes `0_2`."""
    return re.sub(r"\.{2,}|[^A-Za-z0-9.-]+", "_", value).strip("_") or "empty"
