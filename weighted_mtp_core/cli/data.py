"""Make data ready, and show what is there.

A data source may make its data once, for example label responses by running them, and keep them under
datasets_v2/<name>/<version>/ with a manifest, statistics and what they depend on. A run does this by itself;
`prepare` does it alone, for example on a machine without an accelerator. `preview` shows what the first step
of a run trains on: each token with its id, whether it is a target, and its weight.

examples:
  data preview configs/baseline.toml
  data preview configs/baseline.toml -n 10 --html preview.html
  data prepare configs/baseline.toml
  data prepare configs/baseline.toml --set data.options.seed=1
  data show
  data show my_data
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weighted_mtp_core.api import SPLITS, example_statistics
from weighted_mtp_core.cli.arguments import add_actions, add_folder, add_recipe_arguments, plan_from
from weighted_mtp_core.cli.table import print_rows
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import did_you_mean
from weighted_mtp_core.storage.manifest import MANIFEST, verify_manifest
from weighted_mtp_core.storage.versions import dataset_folder, versions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare, preview, show = add_actions(parser, _prepare, _preview, _show)
    add_recipe_arguments(prepare)
    add_recipe_arguments(preview)
    preview.add_argument("-n", metavar="N", dest="count", type=int, default=3, help="documents (default: 3)")
    preview.add_argument("--html", metavar="FILE", type=Path, help="write a page instead of text")
    show.add_argument("name", metavar="NAME", nargs="?", help="(all)")
    add_folder(show, "--storage", default="storage")


def _prepare(args: argparse.Namespace) -> None:
    """Make the data of a recipe ready."""
    plan = plan_from(args)
    recipe = plan.recipe
    storage = Path(recipe.run.storage)
    source = plan.data.build(plan.data_context)
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
    """Show texts, targets and weights of the first step of a run."""
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
    """Print one line per split; the last column counts problems by their share of correct responses."""
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
