"""Check a recipe and print its plan.

The plan: the components with their options, the experiment and the tags. Every mistake is listed with its
file, line and key. Trains nothing and takes less than a second.

examples:
  check configs/baseline.toml
  check configs/baseline.toml --preset ci --set train.learning_rate=1e-3
  check configs/baseline.toml --resolved > resolved.toml       the recipe with every default filled in
"""

from __future__ import annotations

import argparse

from weighted_mtp_core.cli.arguments import add_recipe_arguments, plan_from
from weighted_mtp_core.cli.table import print_rows
from weighted_mtp_core.identifiers import flat
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.plugins.selection import SelectedComponent
from weighted_mtp_core.recipe.structure import plain
from weighted_mtp_core.recipe.train_table import TrainTable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument(
        "--resolved", action="store_true", help="print the resolved recipe as TOML instead of the plan"
    )


def main(args: argparse.Namespace) -> None:
    plan = plan_from(args)
    if args.resolved:
        print(plan.recipe_toml, end="")
    else:
        print_rows(_rows(plan))
        print("\ntags")
        print_rows(list(plan.tags.items()), indent="  ")


def _rows(plan: Plan) -> list[tuple[str, ...]]:
    recipe = plan.recipe
    rows = [
        ("recipe", " < ".join(reversed(plan.files))),
        ("run", f"{recipe.run.name} (seed {recipe.run.seed})"),
        ("experiment", plan.experiment),
        ("model", f"{recipe.model.base}, {recipe.model.n_future} {recipe.model.heads.kind} heads"),
        ("data", *_describe(plan.data)),
        ("critic", *(_describe(plan.critic) if plan.critic else ("none",))),
        ("weighting", *_describe(plan.weighting)),
    ]
    rows += [("tracker", *_describe(tracker)) for tracker in plan.trackers] or [("tracker", "none")]
    if recipe.critic:
        rows.append(("critic training", _describe_training(recipe.critic.train)))
    rows.append(("policy training", _describe_training(recipe.train)))
    rows.append(("evaluation", "pass@" + ", @".join(str(k) for k in recipe.evaluate.pass_at_k)))
    return rows


def _describe_training(table: TrainTable) -> str:
    optimiser = f"{table.optimiser.name}, learning rate {table.learning_rate:g}, {table.schedule}"
    return f"{table.length} of {table.batch_size} rows; {optimiser}"


def _describe(chosen: SelectedComponent) -> tuple[str, str]:
    options = ", ".join(f"{key} = {value}" for key, value in flat(plain(chosen.options)))
    origin = f"{chosen.plugin.distribution} {chosen.plugin.version}"
    return chosen.address, f"{origin}; {options}" if options else origin
