"""`run`: carry out a recipe."""

from __future__ import annotations

import argparse
from typing import Any

from weighted_mtp_core.cli.recipe_arguments import add_recipe_arguments, plan_from
from weighted_mtp_core.errors import EXIT_DONE

_DESCRIPTION = """\
Train, evaluate and record what a recipe describes:
  0 prepare    the data and the model
  1 critic     trained if the recipe has one
  2 policy     weighted multi-token training
  3 evaluate   losses, pass@k by running what the policy writes, decoding speed
The whole recipe is checked before anything heavy is imported."""
_EPILOG = """\
examples:
  run configs/baseline.toml
  run configs/baseline.toml --preset local-light            a quick look on a laptop
  run configs/baseline.toml --set train.steps=50 --set run.seed=7
  run configs/baseline.toml --run-name my_second_try"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run", help="carry out a recipe", description=_DESCRIPTION, epilog=_EPILOG
    )
    add_recipe_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    """Plan the recipe, then run it."""
    plan = plan_from(args)
    from weighted_mtp_core.stages.run import run_plan  # imports torch

    run_plan(plan)
    return EXIT_DONE
