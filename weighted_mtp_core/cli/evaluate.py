"""Measure a finished run again.

The command measures the best policy of the run: the loss of each head, pass@k (by judging completions), and
the speed of decoding. The settings of the evaluation are those of the run's recipe unless an option changes
them. The command writes metrics.json and, for data with problems, samples.jsonl (in HumanEval's format) and
verdicts.jsonl. RUN may also be an exported model; the files of an exported model never change.

examples:
  evaluate 20261123-140924 --split validation
  evaluate 20261123-140924 --samples 10 --temperature 0.8 --pass-at-k 1,5
  evaluate 20261123-140924 --samples 10 --pass-at-k 1,10 --choose-temperature 0.2,0.6,0.8
  evaluate models/sorter                                   an exported model, on the run's data

A temperature must not be chosen on the problems for which results are reported. Therefore,
--choose-temperature solves the validation problems at each temperature, and the test problems only at the
temperature with the best pass@k on the validation problems, for the largest k.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weighted_mtp_core.api import Split
from weighted_mtp_core.cli.arguments import add_run_arguments, evaluate_overrides, list_of
from weighted_mtp_core.cli.table import print_rows
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.recipe.structure import plain
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.tracking.run_folder import new_run_id


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, also=", or an exported model")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="(default: test)")
    parser.add_argument("--samples", metavar="N", type=int, help="completions per problem")
    heat = parser.add_mutually_exclusive_group()
    heat.add_argument("--temperature", metavar="T", type=float, help="0 is greedy")
    heat.add_argument(
        "--choose-temperature",
        metavar="T,T,...",
        type=list_of(float),
        help="of these temperatures, use the best on the validation problems",
    )
    parser.add_argument(
        "--pass-at-k", metavar="K,K,...", type=list_of(int), help="each k needs at least k samples"
    )
    parser.add_argument(
        "--problems", metavar="N", type=int, help="only the first N problems of the split; 0 means all"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="(default: RUN/evaluations/<time>; for exported models <storage>/evaluations/<name>/<time>)",
    )


def main(args: argparse.Namespace) -> None:
    if args.choose_temperature and args.split != "test":
        raise WmtpError(
            "`--choose-temperature` chooses on the split `validation`, so only `test` can be reported",
            hint="leave out `--split`, or give each temperature alone: --split validation --temperature 0.2",
        )
    from weighted_mtp_core.evaluation.finished_run import find_finished

    run = find_finished(args.runs, args.run)
    plans = _plans(run, args)
    out: Path = args.out or _evaluations(run, plans[0]) / new_run_id()
    report = _measure(run, plans, split=args.split, out=out)
    _print(report, out)


def _plans(run: Path, args: argparse.Namespace) -> list[Plan]:
    """Return the run's plan with the command-line options applied, once for each temperature to try."""
    from weighted_mtp_core.evaluation.finished_run import plan_of

    changes = evaluate_overrides(args, "samples", "temperature", "pass_at_k", "problems")
    if args.choose_temperature is None:
        return [plan_of(run, overrides=changes)]
    return [plan_of(run, overrides=[*changes, f"evaluate.temperature={t}"]) for t in args.choose_temperature]


def _evaluations(run: Path, plan: Plan) -> Path:
    """Return the folder for evaluations, which is inside a run folder but outside an exported model."""
    from weighted_mtp_core.model.exported_model import is_exported_model

    if is_exported_model(run):
        return Path(plan.recipe.run.storage) / "evaluations" / run.name
    return run / "evaluations"


def _measure(run: Path, plans: Sequence[Plan], *, split: Split, out: Path) -> dict[str, Any]:
    """Measure the policy and write all files; of several plans, the best on the validation split is used."""
    from rich.console import Console

    from weighted_mtp_core.evaluation.evaluate import best_trial, evaluate, try_temperatures
    from weighted_mtp_core.evaluation.finished_run import prepare_finished
    from weighted_mtp_core.tracking.display import Display

    _make_folder(out)
    tables = [plan.recipe.evaluate for plan in plans]
    with Display(Console(stderr=True)) as display:
        prepared = prepare_finished(run, plans[0], log=display.note)
        trials = try_temperatures(prepared, tables, display=display) if len(tables) > 1 else ()
        table = best_trial(trials).table if trials else tables[0]
        found = evaluate(prepared, table, display=display, folder=out, split=split)
    version = prepared.source.version()
    report = {
        "run": run.name,
        "data": {"name": version.name, "version": version.version, "sha256": version.sha256},
        "split": split,
        "seed": plans[0].recipe.run.seed,
        "evaluate": plain(table),
        "chosen_on_validation": [
            {"temperature": trial.table.temperature, "metrics": dict(trial.metrics)} for trial in trials
        ],
        "metrics": dict(found.metrics),
        "timings": dict(found.timings),
    }
    atomic_write(out / "metrics.json", json.dumps(report, indent=1) + "\n")
    return report


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WmtpError(
            f"cannot make the folder `{out}`: {error.strerror}", hint="choose another `--out`"
        ) from error


def _print(report: Mapping[str, Any], out: Path) -> None:
    for trial in report["chosen_on_validation"]:
        rates = "  ".join(f"{k} {v:.3f}" for k, v in trial["metrics"].items() if k.startswith("pass_at"))
        print(f"validation at temperature {trial['temperature']:g}  {rates}")
    print_rows(
        [
            ("data", f"{report['data']['name']} {report['data']['version']}"),
            ("split", report["split"]),
            ("temperature", f"{report['evaluate']['temperature']:g}"),
            *((name, f"{value:.4g}") for name, value in (report["metrics"] | report["timings"]).items()),
            ("files", str(out)),
        ]
    )
