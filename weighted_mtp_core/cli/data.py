r"""Prepare, preview, sample and show data.

A data source may create its data once, for example by running responses to label them, and store the data
under datasets_v2/<name>/<version>/ with a manifest, statistics and provenance. A run prepares its data by
itself; `data prepare` only prepares the data, for example on a machine without an accelerator.
`data preview` shows what the first step of a run trains on: each token with its id, whether it is a target,
and its weight. `data sample` lets a run, an exported model or a server generate texts for the problems of a
recipe, judges the texts, and stores them as a new data set. The data source `core.jsonl` reads the file
samples.jsonl of such a data set. If `data sample` was stopped, the same command continues.

examples:
  data preview configs/baseline.toml
  data preview configs/baseline.toml -n 10 --html preview.html
  data prepare configs/baseline.toml
  data prepare configs/baseline.toml --set data.options.seed=1
  data prepare configs/baseline.toml --executor dask://node-0:8786
  data sample 20261123-140924 configs/baseline.toml --samples 4 --temperature 0.8 --to mine
  data sample models/sorter configs/baseline.toml --samples 4 --temperature 0.8 --to mine \
      --endpoint http://127.0.0.1:8000/v1
  data show
  data show my_data
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from weighted_mtp_core.api import SPLITS, example_statistics
from weighted_mtp_core.cli.arguments import (
    add_actions,
    add_executor,
    add_folder,
    add_recipe_arguments,
    add_run,
    evaluate_overrides,
    plan_from,
)
from weighted_mtp_core.cli.table import print_rows
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.executors.address import open_executor
from weighted_mtp_core.identifiers import NAME
from weighted_mtp_core.messages import did_you_mean
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.storage.manifest import MANIFEST, verify_manifest
from weighted_mtp_core.storage.versions import dataset_folder, versions

if TYPE_CHECKING:
    from weighted_mtp_core.generation.samplers import Sampler


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare, preview, sample, show = add_actions(parser, _prepare, _preview, _sample, _show)
    add_recipe_arguments(prepare)
    add_executor(prepare, default="default: this machine, with the recipe's number of programs at once")
    add_recipe_arguments(preview)
    preview.add_argument("-n", metavar="N", dest="count", type=int, default=3, help="documents (default: 3)")
    preview.add_argument("--html", metavar="FILE", type=Path, help="write a page instead of text")
    add_run(sample, also=", an exported model, or with --endpoint the name of a model at the server")
    add_recipe_arguments(sample)
    sample.add_argument(
        "--runs", metavar="FOLDER", type=Path, help="folder of the runs (default: from RECIPE)"
    )
    sample.add_argument("--to", metavar="NAME", required=True, help="name of the new data set")
    sample.add_argument(
        "--samples",
        metavar="N",
        type=int,
        help="texts for each problem (default: the recipe's `evaluate.samples`)",
    )
    sample.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        help="0 is greedy (default: the recipe's `evaluate.temperature`)",
    )
    sample.add_argument(
        "--split", choices=SPLITS, default="train", help="split of the problems (default: train)"
    )
    sample.add_argument(
        "--problems", metavar="N", type=int, default=0, help="only the first N problems (default: all)"
    )
    sample.add_argument("--endpoint", metavar="URL", help="take the texts from a server's completions API")
    sample.add_argument(
        "--in-flight", metavar="N", type=int, default=16, help="requests at once (default: 16)"
    )
    sample.add_argument(
        "--retries", metavar="N", type=int, default=6, help="retries of a request (default: 6)"
    )
    sample.add_argument(
        "--timeout", metavar="S", type=float, default=600, help="seconds until a request fails (default: 600)"
    )
    show.add_argument("name", metavar="NAME", nargs="?", help="name of a data set (default: all)")
    add_folder(show, "--storage", default="storage")


def _prepare(args: argparse.Namespace) -> None:
    """Prepare the data of a recipe."""
    plan = plan_from(args)
    recipe = plan.recipe
    storage = Path(recipe.run.storage)
    if args.executor is None:
        source = plan.data.build(plan.data_context)
    else:
        with open_executor(args.executor, [plan]) as executor:
            source = plan.data.build(attrs.evolve(plan.data_context, executor=executor))
    version = source.version()
    folder = dataset_folder(storage, version.name, version.version)
    is_stored = (folder / MANIFEST).is_file()
    print_rows(
        [
            ("data", f"{version.name} {version.version}"),
            ("sha256", version.sha256),
            ("folder", str(folder) if is_stored else "none: read from its own files"),
        ]
    )
    _print_splits({split: example_statistics(source.examples(split)) for split in SPLITS})


def _preview(args: argparse.Namespace) -> None:
    """Show texts, targets and weights in the first step of a run."""
    from weighted_mtp_core.report.preview import preview
    from weighted_mtp_core.report.preview_views import print_preview, write_page

    if args.count < 1:
        raise WmtpError(f"`-n` must be at least 1, got {args.count}")
    shown = preview(plan_from(args), count=args.count, log=lambda text: print(text, file=sys.stderr))
    if args.html is None:
        print_preview(shown)
        return
    write_page(shown, args.html)
    print_rows([("page", str(args.html))])


def _sample(args: argparse.Namespace) -> None:
    """Generate texts with a run, a model or a server, judge them, and store them as a data set."""
    from rich.console import Console

    from weighted_mtp_core.evaluation.sampled_data import SAMPLES, SampledData, describe_counts
    from weighted_mtp_core.tracking.display import Display

    _check_sample(args)
    plan = plan_from(args, "evaluate.pass_at_k=[1]", *evaluate_overrides(args, "samples", "temperature"))
    source = plan.data.build(plan.data_context)
    problems = source.problems(args.split)
    if not problems:
        raise WmtpError(
            f"data source `{plan.data.address}` has no problems in the split `{args.split}`",
            hint="use a recipe whose data source judges completions, or another `--split`",
        )
    with Display(Console(stderr=True)) as display:
        model, sampler = _sampler(args, plan, log=display.note)
        data = SampledData(
            model=model,
            sampler=sampler,
            problems=problems[: args.problems or len(problems)],
            split=args.split,
            source=source,
            plan=plan,
            name=args.to,
        )
        stored = data.store(display)
    print_rows(
        [
            ("data", f"{stored.version.name} {stored.version.version}"),
            ("sha256", stored.version.sha256),
            ("file", str(stored.folder / SAMPLES)),
            *describe_counts(stored.folder),
        ]
    )


def _check_sample(args: argparse.Namespace) -> None:
    if not re.fullmatch(NAME, args.to) or ".." in args.to:
        raise WmtpError(f"`--to {args.to}` must match `{NAME}`, without `..`")
    for name in ("in_flight", "timeout"):
        if not getattr(args, name) > 0:
            raise WmtpError(f"`--{name.replace('_', '-')} {getattr(args, name)}`: expected a positive number")
    for name in ("problems", "retries"):
        if getattr(args, name) < 0:
            raise WmtpError(f"`--{name} {getattr(args, name)}`: expected 0 or more")


def _sampler(
    args: argparse.Namespace, plan: Plan, *, log: Callable[[str], None]
) -> tuple[dict[str, Any], Callable[[], Sampler]]:
    """Return facts that identify the model, and a function that creates the sampler of this model."""
    from weighted_mtp_core.evaluation.finished_run import find_finished, policy_loader, policy_sha256
    from weighted_mtp_core.generation.endpoint import EndpointSampler
    from weighted_mtp_core.generation.samplers import PolicySampler

    table, seed = plan.recipe.evaluate, plan.recipe.run.seed
    if args.endpoint is not None:
        served = EndpointSampler(
            model=args.run,
            url=args.endpoint,
            table=table,
            seed=seed,
            in_flight=args.in_flight,
            retries=args.retries,
            timeout=args.timeout,
        )
        return {"name": args.run, "from": "server"}, lambda: served
    folder = find_finished(args.runs or plan.runs_folder, args.run)
    loader = policy_loader(folder, overrides=[])

    def load() -> Sampler:
        policy, codec = loader.load(log)
        return PolicySampler(
            policy=policy, codec=codec, table=table, seed=seed, autocast=loader.compute.autocast
        )

    identity = {"name": folder.name, "sha256": policy_sha256(folder), **loader.compute.precision}
    return identity, load


def _show(args: argparse.Namespace) -> None:
    """Show statistics and provenance of the data in storage."""
    stored = {
        name: version.path
        for version in versions(args.storage)
        for kind, _, name in [version.address.partition("/")]
        if kind == "datasets_v2"
    }
    chosen = {
        name: path
        for name, path in stored.items()
        if args.name is None or args.name in (name, name.partition("/")[0])
    }
    if not chosen:
        wanted = "data" if args.name is None else f"data `{args.name}`"
        raise WmtpError(
            f"there is no {wanted} in `{args.storage}`",
            hint=did_you_mean(args.name or "", {name.partition("/")[0] for name in stored})
            or "make some: data prepare RECIPE",
        )
    for name, path in chosen.items():
        print_rows(
            [("data", name.replace("/", " ")), ("sha256", verify_manifest(path)), ("folder", str(path))]
        )
        statistics, provenance = (
            json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            for file in (path / "statistics.json", path / "provenance.json")
        )
        if "splits" in statistics:
            _print_splits(statistics.pop("splits"))
        for key, value in {**statistics, **provenance}.items():
            line = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            if line:
                print(f"{key}: {line}")
        print()


def _print_splits(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Print one line per split; the last column counts the problems in each bin of mean reward."""
    rows: list[tuple[str, ...]] = [
        ("split", "problems", "responses", "right", "prompt", "response", "difficulty")
    ]
    for split in SPLITS:
        found = splits[split]
        if not found["responses"]:
            rows.append((split, "0", "0", "", "", "", ""))
            continue
        rows.append(
            (
                split,
                str(found["problems"]),
                str(found["responses"]),
                f"{found['reward_rate']:.1%}",
                *(f"{found[f'{what}_characters']['median']:g}" for what in ("prompt", "response")),
                ", ".join(f"{share}: {count}" for share, count in found["difficulty"].items() if count),
            )
        )
    print_rows(rows)
