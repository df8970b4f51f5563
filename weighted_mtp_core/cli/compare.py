"""Run recipes side by side and compare them.

All recipes run with the same seeds, and must have the same data, model, budget and evaluation, except for the
keys in --allow-difference. Each recipe is compared to the first recipe, at equal steps and at equal wall
clock: the tables show means over seeds with 95 % intervals, and paired differences with an exact permutation
test. Finished runs are not repeated, so the same command continues a comparison that was stopped. The command
writes compare.md, compare.json, compare.csv and the learning curves.

examples:
  compare configs/baseline.toml configs/my_recipe.toml --seeds 5
  compare configs/study/*.toml --seeds 5 --set data.options.incorrect_fraction=0.4
  compare configs/baseline.toml configs/my_recipe.toml --metrics pass_at_1,test_ce_head_1
  compare configs/baseline.toml mine.toml --grid weighting.options.power=1,2
  compare configs/study/*.toml --executor dask://node-0:8786
  compare mine/*.toml --floor right_only --ceiling oracle --allow-difference data.options.imitate
  compare --experiment my_group/my_study

Each recipe is an arm of the comparison. `--preset` and `--set` apply to every arm. `--grid` makes an arm of
each combination of values, except for recipes that do not have its key. `--executor` selects where the runs
are executed; the machines of a Dask cluster must share the storage. The seeds of the runs count up from the
`run.seed` of the first recipe. If a run fails, the other runs are compared and the exit code is 1. Instead of
recipes, `--experiment` and `--runs` compare finished runs in MLflow.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weighted_mtp_core.cli.arguments import add_executor, add_override_arguments, add_repeatable, list_of
from weighted_mtp_core.compare.arms import Arm, digest, read_arms
from weighted_mtp_core.compare.grid import parse_grids
from weighted_mtp_core.compare.jobs import plan_jobs, refuse_other_data
from weighted_mtp_core.compare.runner import (
    MOST_SEEDS,
    Outcome,
    Runner,
    given_threads,
    share_machine,
    visible_gpus,
)
from weighted_mtp_core.compare.task import use_gpu
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.executors.address import local_slots, open_executor
from weighted_mtp_core.exit_codes import EXIT_DONE, EXIT_RUN_FAILED
from weighted_mtp_core.messages import did_you_mean, quoted
from weighted_mtp_core.storage.atomic import atomic_write

if TYPE_CHECKING:
    from weighted_mtp_core.compare.gap import Gap
    from weighted_mtp_core.compare.measures import RunMeasures
    from weighted_mtp_core.compare.table import Comparison


_SEEDS = 5
"""Number of seeds without `--seeds`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", metavar="RECIPE", nargs="*", type=Path, help="a recipe for each arm")
    add_repeatable(
        parser,
        "--experiment",
        metavar="NAME",
        help="instead of recipes: finished runs of an experiment in MLflow, one arm per run name",
    )
    parser.add_argument(
        "--runs",
        metavar="ID,ID,...",
        type=list_of(str),
        default=[],
        help="instead of recipes, or with --experiment: runs in MLflow, by id (MLflow's or the run folder's)",
    )
    parser.add_argument("--seeds", metavar="N", type=int, help=f"number of seeds (default: {_SEEDS})")
    add_executor(parser, default="default: local:N, with one run per GPU or, without GPUs, per core")
    add_override_arguments(parser)
    add_repeatable(
        parser, "--grid", metavar="KEY=VALUE,...", dest="grids", help="an arm for each combination of values"
    )
    parser.add_argument(
        "--metrics",
        metavar="NAME,NAME,...",
        type=list_of(str),
        help="metrics to compare (default: pass@k, losses per head, speed)",
    )
    add_repeatable(
        parser,
        "--allow-difference",
        metavar="KEY",
        help="compare even if this key of data, model, train or evaluate differs",
    )
    parser.add_argument(
        "--floor",
        metavar="ARM",
        help="a lower bound; with --ceiling: show how much of the gap between them each other arm closes",
    )
    parser.add_argument("--ceiling", metavar="ARM", help="an arm that is an upper bound, such as an oracle")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="(default: <storage>/comparisons/<first arm>-<digest of all>)"
    )


def main(args: argparse.Namespace) -> int:
    _check(args)
    return _compare_recipes(args) if args.recipes else _compare_stored(args)


def _check(args: argparse.Namespace) -> None:
    stored = bool(args.experiment or args.runs)
    if stored == bool(args.recipes):
        raise WmtpError(
            "name either recipes, or runs that are in MLflow with `--experiment` and `--runs`",
            hint="see: python -m weighted_mtp_core compare --help",
        )
    if stored and (args.preset or args.overrides or args.grids or args.executor or args.seeds):
        raise WmtpError(
            "`--preset`, `--set`, `--grid`, `--executor` and `--seeds` are for recipes, not for stored runs"
        )
    if args.seeds is not None and not 1 <= args.seeds <= MOST_SEEDS:
        raise WmtpError(f"`--seeds {args.seeds}`: expected 1 to {MOST_SEEDS}")
    if args.executor is not None:
        local_slots(args.executor)
    in_grids = {each.split("=")[0].strip() for each in args.grids}
    if both := [each for each in args.overrides if each.split("=")[0].strip() in in_grids]:
        raise WmtpError(f"`--set {both[0]}` has no effect, because `--grid` sets the same key")
    if any(each.split("=")[0].strip() == "run.seed" for each in args.overrides):
        raise WmtpError("`--set run.seed` would give every run the same seed", hint="use --seeds N")


def _compare_recipes(args: argparse.Namespace) -> int:
    arms = read_arms(
        args.recipes,
        preset=args.preset,
        overrides=args.overrides,
        allowed=args.allow_difference,
        grids=parse_grids(args.grids),
    )
    from weighted_mtp_core.compare.gap import Gap

    gap = Gap.of(args.floor, args.ceiling, arms=[arm.name for arm in arms])
    first = arms[0].plan.recipe.run
    seeds = [first.seed + number for number in range(args.seeds or _SEEDS)]
    out: Path = args.out or Path(first.storage) / "comparisons" / f"{arms[0].name}-{digest(arms, seeds)}"
    outcome = _execute(arms, seeds, address=args.executor, out=out)
    if not outcome.finished:
        raise RunFailedError(
            f"every run failed, the first with: {outcome.failures[0].reason}",
            hint=f"see {outcome.failures[0].log}",
        )
    refuse_other_data(outcome.finished, allowed=args.allow_difference)
    from weighted_mtp_core.compare.measures import kinds_of_machines
    from weighted_mtp_core.compare.mlflow_record import track

    comparison, files = _write(
        _measure(arms, outcome),
        seeds,
        missing=[f"{each.job.label}: {each.reason} (`{each.log}`)" for each in outcome.failures],
        machines=kinds_of_machines(outcome.finished.values()),
        metrics=args.metrics,
        out=out,
        gap=gap,
    )
    track(arms, comparison, runs=outcome.finished, files=files, folder=out, log=print)
    return EXIT_RUN_FAILED if outcome.failures else EXIT_DONE


def _compare_stored(args: argparse.Namespace) -> int:
    from weighted_mtp_core.compare.gap import Gap
    from weighted_mtp_core.compare.mlflow_record import record_comparison
    from weighted_mtp_core.compare.mlflow_runs import read_stored

    storage = Path("storage")
    stored = read_stored(
        experiments=args.experiment, run_ids=args.runs, allowed=args.allow_difference, storage=storage
    )
    gap = Gap.of(args.floor, args.ceiling, arms=list(stored.runs))
    ids = sorted(run.info.run_id for run in stored.all)
    of_ids = hashlib.sha256(" ".join(ids).encode()).hexdigest()[:8]
    out: Path = args.out or storage / "comparisons" / f"{next(iter(stored.runs))}-{of_ids}"
    comparison, files = _write(
        stored.measures, stored.seeds, missing=(), machines=(), metrics=args.metrics, out=out, gap=gap
    )
    if record_comparison(stored.tracker, stored.describe(out), comparison, files=files, log=print):
        stored.adopt(stored.tracker.run_id)
        print(f"look at it: {stored.tracker.where()}")
    return EXIT_DONE


def _execute(arms: Sequence[Arm], seeds: Sequence[int], *, address: str | None, out: Path) -> Outcome:
    """Execute the runs that have not finished yet, and show the progress."""
    from rich.console import Console

    from weighted_mtp_core.tracking.display import Display

    every = plan_jobs(arms, seeds)
    slots = None if address is None else local_slots(address)
    if address is not None and slots is None:
        at_once, threads, gpus = None, given_threads() or 1, []
    else:
        gpus = visible_gpus(arms)
        at_once, threads = share_machine(slots, len(every), gpus=len(gpus))
        address = f"local:{at_once}"
    names = itertools.cycle(gpus)
    with (
        Display(Console(stderr=True)) as display,
        open_executor(
            address,
            [arm.plan for arm in arms],
            in_each_thread=(lambda: use_gpu(next(names))) if gpus else None,
        ) as executor,
    ):
        where = f"{at_once} runs at once" if at_once else f"at {address}"
        display.note(f"{len(arms)} arms x {len(seeds)} seeds: {where}, {threads} threads each; to {out}")
        display.stage("compare", len(every))
        runner = Runner(
            executor=executor,
            at_once=at_once,
            threads=threads,
            logs=out / "logs",
            log=display.note,
            on_done=lambda done: display.update(done, {}),
        )
        return runner.run(every)


def _measure(arms: Sequence[Arm], outcome: Outcome) -> dict[str, dict[int, RunMeasures]]:
    """Read the measures of finished runs, keyed by arm and seed; arms without a finished run are left out.

    Raises:
        RunFailedError: The first arm has no finished run.
    """
    from weighted_mtp_core.compare.measures import read_measures

    runs: dict[str, dict[int, RunMeasures]] = {}
    for job in sorted(outcome.finished, key=lambda job: (arms.index(job.arm), job.seed)):
        runs.setdefault(job.arm.name, {})[job.seed] = read_measures(outcome.finished[job])
    if arms[0].name not in runs:
        raise RunFailedError(
            f"no run of the first arm `{arms[0].name}` finished, so there is nothing to compare to",
            hint=f"see {outcome.failures[0].log}",
        )
    return runs


def _write(
    runs: Mapping[str, Mapping[int, RunMeasures]],
    seeds: Sequence[int],
    *,
    missing: Sequence[str],
    machines: Sequence[str],
    metrics: Sequence[str] | None,
    out: Path,
    gap: Gap | None,
) -> tuple[Comparison, list[Path]]:
    """Compare the runs, print the table, and write the table and the plots.

    Returns:
        The comparison, and the files that were written.

    Raises:
        WmtpError: `metrics` contains a name that is a metric of no run.
    """
    from weighted_mtp_core.compare.measures import default_metrics
    from weighted_mtp_core.compare.plots import plot_curves
    from weighted_mtp_core.compare.table import Comparison

    everything = [run for by_seed in runs.values() for run in by_seed.values()]
    known = set.union(*(set(run.last) for run in everything))
    for name in metrics or ():
        if name not in known:
            hint = did_you_mean(name, sorted(known)) or f"they have {quoted(sorted(known))}"
            raise WmtpError(f"no run has the metric `{name}`", hint=hint)
    shown = metrics or default_metrics(everything)
    comparison = Comparison.make(
        runs, metrics=shown, seeds=seeds, missing=missing, machines=machines, gap=gap
    )
    tables = {
        "compare.md": comparison.markdown(),
        "compare.json": comparison.json(),
        "compare.csv": comparison.csv(),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in tables.items():
        atomic_write(out / name, text)
    print(tables["compare.md"])
    print(f"written to {out}")
    return comparison, [*(out / name for name in tables), *plot_curves(runs, shown, out)]
