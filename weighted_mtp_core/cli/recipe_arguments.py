"""The arguments that say which recipe is meant; every command that reads a recipe takes the same ones."""

from __future__ import annotations

import argparse
from pathlib import Path

from weighted_mtp_core.plan import Plan, make_plan


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RECIPE, `--preset`, `--set`, `--run-name` and `--micro`."""
    parser.add_argument(
        "recipe", metavar="RECIPE", type=Path, help="a TOML file such as configs/baseline.toml"
    )
    parser.add_argument("--preset", metavar="NAME", help="put presets/NAME.toml on top, for example `ci`")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change a key, like train.steps=50 or tracker.0.options.x=1; repeatable, wins over all",
    )
    parser.add_argument("--run-name", metavar="NAME", help="the same as --set run.name=NAME")
    parser.add_argument("--micro", action="store_true", help="the same as --set model.base=micro")


def plan_from(args: argparse.Namespace) -> Plan:
    """Make the plan that the arguments ask for.

    Raises:
        WmtpError: See `make_plan`.
    """
    micro = ["model.base=micro"] if args.micro else []
    overrides = [*micro, *args.overrides]
    return make_plan(args.recipe, preset=args.preset, overrides=overrides, run_name=args.run_name)
