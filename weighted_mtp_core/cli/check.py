"""Check a recipe and print its plan.

The plan contains the components with their options, the experiment and the tags. If the recipe has mistakes,
each mistake is listed with its file, line and key. The command trains nothing and takes less than a second.

With --memory, the command prints how much memory the run takes, and which keys lower this amount. For this
forecast, the steps of a run are executed on tensors without values, which takes seconds; no weights are read.

examples:
  check configs/baseline.toml
  check configs/baseline.toml --preset ci --set train.learning_rate=1e-3
  check configs/baseline.toml --resolved > resolved.toml       the recipe with every default filled in
  check configs/baseline.toml --memory                         the memory of a run on this machine
  check configs/baseline.toml --memory --device-memory 80GB --processes 8     on eight such GPUs
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
    parser.add_argument("--memory", action="store_true", help="print the forecast of the run's memory")
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="with --memory: memory of a GPU, for example 80GB (default: memory of this machine)",
    )
    parser.add_argument(
        "--processes", metavar="N", type=int, default=1, help="with --memory: processes that train together"
    )


def main(args: argparse.Namespace) -> None:
    plan = plan_from(args)
    if args.memory:
        _print_memory(plan, device_memory=args.device_memory, processes=args.processes)
    elif args.resolved:
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


def _print_memory(plan: Plan, *, device_memory: str | None, processes: int) -> None:
    """Print the forecast of a run's memory for this machine, or for another machine with the given memory."""
    from weighted_mtp_core.memory import table  # imports torch
    from weighted_mtp_core.memory.fit import find_target
    from weighted_mtp_core.memory.forecast import forecast, parse_size
    from weighted_mtp_core.memory.longest import longest_documents
    from weighted_mtp_core.memory.savings import savings

    given = None if device_memory is None else parse_size(device_memory)
    target, device, host = find_target(plan, processes=processes, device_memory=given)
    documents = longest_documents(plan, tokenise=False)
    found = forecast(plan, documents, target)
    print(table.headline(found), "\n")
    print_rows(table.phase_rows(found.device))
    print()
    if found.host:
        print(table.verdict(f"`{target.device}`", found.peak, device, complete=not found.uncounted))
    print(table.verdict("main memory", found.host_peak, host, complete=not found.uncounted))
    for line in found.uncounted:
        print(f"not counted: {line}")
    print("\nkeys that lower the largest total, each alone")
    print_rows(table.saving_rows(savings(plan, documents, found), found.peak), indent="  ")
