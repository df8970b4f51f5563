"""The arguments of every command that reads a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from weighted_mtp_core.plan import Plan, make_plan


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RECIPE, `--preset`, `--set`, `--run-name` and `--micro`."""
    parser.add_argument(
        "recipe", metavar="RECIPE", type=Path, help="a TOML file such as configs/baseline.toml"
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="change the recipe by configs/presets/NAME.toml, for example ci"
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change one key: train.steps=50, weighting.options.clip=[0,2], tracker.0.use=core.mlflow; "
        "repeatable, overrides files and preset",
    )
    parser.add_argument("--run-name", metavar="NAME", help="short for --set run.name=NAME")
    parser.add_argument(
        "--micro",
        action="store_true",
        help="short for --set model.base=micro: a small model without download",
    )


def plan_from(args: argparse.Namespace) -> Plan:
    """Make the plan of the recipe that the arguments name.

    Raises:
        WmtpError: See `make_plan`.
    """
    micro = ["model.base=micro"] if args.micro else []
    overrides = [*micro, *args.overrides]
    return make_plan(args.recipe, preset=args.preset, overrides=overrides, run_name=args.run_name)
