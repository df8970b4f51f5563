"""The arms of a comparison: one recipe for each arm, with equal data, model, budget and evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import frozen

from weighted_mtp_core.compare.grid import Grid, arms_of_grids, refuse_unknown_keys
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.plan import Plan, make_plan

EQUAL = ("data", "evaluate", "model", "train")
"""Tables of a recipe that must be equal in all arms, except for keys that are allowed to differ."""

ALGORITHM = ("critic", "loss", "weighting")
"""Tables of a recipe that, like `EQUAL` and with the same exception, must be equal in all runs of one arm."""


@frozen(kw_only=True, eq=False)
class Arm:
    """An arm of a comparison: a recipe that is run with several seeds.

    Attributes:
        recipe: The recipe file.
        preset: Name of the preset, as for `run --preset`; None for the recipe without a preset.
        overrides: The overrides `key=value`, as for `run --set`, without the seed.
        plan: The plan that results from recipe, preset and overrides, with the seed of the recipe.
    """

    recipe: Path
    preset: str | None
    overrides: tuple[str, ...]
    plan: Plan

    @property
    def name(self) -> str:
        """The name of the arm in tables and plots, which is the recipe's `run.name`."""
        return self.plan.recipe.run.name

    def identity(self, seed: int) -> dict[str, dict[str, str]]:
        """Return params and source code that identify this arm's run with a seed; see `Plan.identity`."""
        whole = self.plan.identity
        return {**whole, "params": {**whole["params"], "run.seed": str(seed)}}


def read_arms(
    recipes: Sequence[Path],
    *,
    preset: str | None,
    overrides: Sequence[str],
    allowed: Sequence[str],
    grids: Sequence[Grid] = (),
) -> tuple[Arm, ...]:
    """Make a plan of every recipe, and refuse arms that cannot be compared.

    Args:
        recipes: One recipe for each arm or, with grids, for each group of arms; the first arm is the
            baseline.
        preset: Name of a preset for all arms; None for no preset.
        overrides: Overrides `key=value` for all arms.
        allowed: Keys that may differ between arms, although the comparison is then unfair.
        grids: Keys with several values; a recipe that has some of these keys becomes an arm for each
            combination of their values.

    Raises:
        WmtpError: A recipe is invalid, no recipe has the key of a grid, two arms have the same name, or data,
            model, budget or evaluation differ.
    """
    changes = (*overrides, 'run.resume="auto"')
    plans = [make_plan(recipe, preset=preset, overrides=changes) for recipe in recipes]
    refuse_unknown_keys(grids, plans)
    arms = tuple(
        Arm(
            recipe=recipe,
            preset=preset,
            overrides=(*changes, *more),
            plan=make_plan(recipe, preset=preset, overrides=(*changes, *more)) if more else plan,
        )
        for recipe, plan in zip(recipes, plans, strict=True)
        for more in arms_of_grids(plan, grids)
    )
    by_name: dict[str, Arm] = {}
    for arm in arms:
        if other := by_name.get(arm.name):
            raise WmtpError(
                f"`{other.recipe}` and `{arm.recipe}` are both called `{arm.name}`",
                hint="give each arm a `run.name` of its own",
            )
        by_name[arm.name] = arm
    for arm in arms[1:]:
        refuse_unequal(
            (arms[0].name, arms[0].plan.params),
            (arm.name, arm.plan.params),
            allowed=(*allowed, *arm.plan.same_result, *(grid.key for grid in grids)),
        )
    return arms


def refuse_unequal(
    first: tuple[str, Mapping[str, str]],
    other: tuple[str, Mapping[str, str]],
    *,
    allowed: Sequence[str],
    tables: Sequence[str] = EQUAL,
) -> None:
    """Refuse two arms, or two runs of one arm, given as (name, params), that differ in `tables`.

    Raises:
        WmtpError: The params differ in keys that are not allowed; the message lists these keys.
    """
    (first_name, was), (other_name, now) = first, other
    faults = [
        f"{key}: {was.get(key, 'absent')} in `{first_name}`, {now.get(key, 'absent')} in `{other_name}`"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and is_below(key, tables) and not is_below(key, allowed)
    ]
    if faults:
        key = faults[0].partition(":")[0]
        raise WmtpError(
            f"`{other_name}` cannot be compared with `{first_name}`:\n  " + "\n  ".join(faults),
            hint=f"make them equal, or allow the difference: --allow-difference {key}",
        )


def digest(arms: Sequence[Arm], seeds: Sequence[int]) -> str:
    """Return a hash of 8 characters that depends only on the arms and the seeds."""
    identities = [arm.identity(seed) for arm in arms for seed in seeds]
    return hashlib.sha256(json.dumps(identities, sort_keys=True).encode()).hexdigest()[:8]


def is_below(key: str, tables: Sequence[str]) -> bool:
    """Return whether a dotted key equals one of `tables` or is inside one of these tables."""
    return any(key == each or key.startswith(f"{each}.") for each in tables)
