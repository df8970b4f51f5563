"""`data`: make the data of a recipe ready, and look at what is there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weighted_mtp_core.cli.recipe_arguments import add_recipe_arguments, plan_from
from weighted_mtp_core.cli.table import print_rows
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.exit_codes import EXIT_DONE
from weighted_mtp_core.messages import did_you_mean

_DESCRIPTION = """\
Data are labelled once and kept under datasets_v2/<name>/<version>/ with a manifest, statistics and what
their labels depend on: the sandbox and its limits, and the SHA-256 of the tests. A run does this by itself;
`prepare` does it alone, for example on a machine without an accelerator."""
_EPILOG = """\
examples:
  data prepare configs/baseline.toml
  data prepare configs/baseline.toml --set data.use=code_tasks.mbpp --set data.options.path=mbpp.jsonl
  data show
  data show mbpp"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "data", help="make data ready, and show what is there", description=_DESCRIPTION, epilog=_EPILOG
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    add_recipe_arguments(actions.add_parser("prepare", help="read and label the data of a recipe"))
    show = actions.add_parser("show", help="statistics and provenance of labelled data")
    show.add_argument("name", metavar="NAME", nargs="?", help="(all)")
    show.add_argument("--storage", metavar="FOLDER", type=Path, default=Path("storage"), help="(storage)")
    return parser


def main(args: argparse.Namespace) -> int:
    """Do what was asked."""
    return {"prepare": _prepare, "show": _show}[args.action](args)


def _prepare(args: argparse.Namespace) -> int:
    from weighted_mtp_core.api import SPLITS, BuildContext
    from weighted_mtp_core.data.statistics import statistics_of
    from weighted_mtp_core.storage.versions import dataset_folder

    plan = plan_from(args)
    recipe = plan.recipe
    storage = Path(recipe.run.storage)
    source = plan.data.build(BuildContext(seed=recipe.run.seed, storage=storage))
    version = source.version()
    folder = dataset_folder(storage, version.name, version.version)
    kept = folder / "statistics.json"
    print_rows(
        [
            ("data", f"{version.name} {version.version}"),
            ("sha256", version.sha256),
            # A source that reads its files as they are keeps nothing of its own.
            ("folder", str(folder) if kept.is_file() else "none: read from its own files"),
        ]
    )
    _print_splits({split: statistics_of(source.examples(split)) for split in SPLITS})
    return EXIT_DONE


def _show(args: argparse.Namespace) -> int:
    from weighted_mtp_core.storage.manifest import verify_manifest
    from weighted_mtp_core.storage.versions import versions

    labelled = {
        version.address.partition("/")[2]: version.path
        for version in versions(args.storage)
        if (version.path / "statistics.json").is_file() and (version.path / "provenance.json").is_file()
    }
    chosen = {
        name: path
        for name, path in labelled.items()
        if args.name is None or args.name in (name, name.partition("/")[0])
    }
    if not chosen:
        wanted = "labelled data" if args.name is None else f"data `{args.name}`"
        raise WmtpError(
            f"there is no {wanted} in `{args.storage}`",
            hint=did_you_mean(args.name or "", {name.partition("/")[0] for name in labelled})
            or "make some: data prepare RECIPE",
        )
    for name, path in chosen.items():
        statistics, provenance = (json.loads((path / file).read_text()) for file in _FILES)
        print_rows(
            [("data", name.replace("/", " ")), ("sha256", verify_manifest(path)), ("folder", str(path))]
        )
        _print_splits(statistics["splits"])
        for made in ("solution", "mutant", "sample"):
            if statistics[made]:
                print(f"{made}s: " + ", ".join(f"{kind} {count}" for kind, count in statistics[made].items()))
        print("labels: " + ", ".join(f"{key} {value}" for key, value in provenance["sandbox"].items()))
        print(f"tests: sha256 {provenance['tests_sha256']}\n")
    return EXIT_DONE


_FILES = ("statistics.json", "provenance.json")


def _print_splits(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a line a split; the last columns are problems by their share of right responses."""
    from weighted_mtp_core.api import SPLITS

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
