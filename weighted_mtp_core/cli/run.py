"""Train, evaluate and record a recipe.

A run has four stages:
  0 prepare    load the data and the base model
  1 critic     train the critic, if the recipe has one
  2 policy     train the policy with weighted multi-token prediction
  3 evaluate   measure held-out losses, pass@k and decoding speed
A recipe with mistakes is refused within a second, before torch is imported.

examples:
  run configs/baseline.toml                                   the whole recipe
  run configs/baseline.toml --preset ci                       every stage in a few steps, under a minute
  run configs/baseline.toml --set train.steps=50 --set run.seed=7
  run configs/baseline.toml --run-name my_second_try
  run configs/baseline.toml --resume 20261123-140924          continue the run of that id

signals:
  SIGINT (Ctrl-C)   finish the step, write a checkpoint, then exit with 130; a second signal exits at once
  SIGTERM, SIGHUP   as SIGINT, but exit with 143; under `nohup`, SIGHUP is ignored
  SIGUSR1           write a checkpoint and continue; before training, do so after the first step
"""

from __future__ import annotations

import argparse

from weighted_mtp_core.cli.arguments import add_recipe_arguments, add_repeatable, plan_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument(
        "--resume", metavar="RUN", help="continue this run: a run folder, a run id or a part of a run id"
    )
    add_repeatable(
        parser,
        "--allow-change",
        metavar="KEY",
        help="with --resume: accept another value of this key, for example train.steps",
    )


def main(args: argparse.Namespace) -> None:
    plan = plan_from(args)
    from weighted_mtp_core.run import run_plan  # imports torch

    run_plan(plan, resume=args.resume, allow_change=args.allow_change)
