"""`run`: carry out a recipe."""

from __future__ import annotations

import argparse
from typing import Any

from weighted_mtp_core.cli.recipe_arguments import add_recipe_arguments, plan_from
from weighted_mtp_core.exit_codes import EXIT_DONE

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
  run configs/baseline.toml --run-name my_second_try
  run configs/baseline.toml --resume 20261123-140924        go on where that run stopped

SIGINT (Ctrl-C) and SIGTERM end a run after the step, with a checkpoint; SIGUSR1 takes a checkpoint."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run", help="carry out a recipe", description=_DESCRIPTION, epilog=_EPILOG
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with this run (folder, id or the beginning of an id)"
    )
    parser.add_argument(
        "--allow-change",
        metavar="KEY",
        action="append",
        default=[],
        help="go on although this key differs from the run's own recipe; repeatable",
    )
    return parser


def main(args: argparse.Namespace) -> int:
    """Plan the recipe, then run it."""
    plan = plan_from(args)
    from weighted_mtp_core.run import run_plan  # imports torch

    run_plan(plan, resume=args.resume, allow_change=args.allow_change)
    return EXIT_DONE
