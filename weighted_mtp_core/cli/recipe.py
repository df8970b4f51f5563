"""`recipe convert`: a YAML file of the layout before recipes becomes a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from weighted_mtp_core.cli.table import print_rows
from weighted_mtp_core.errors import EXIT_DONE, WmtpError

_DESCRIPTION = """\
Write a recipe from YAML files of the layout before recipes (`experiment`, `models`, `dataset`, `training`,
`mlflow`, ...), check it, and list where each old key went, or why it has no place any more. Algorithms were
code then and are plugins now, so name the weighting, and the critic if it needs one."""
_EPILOG = """\
examples:
  recipe convert old/experiment.yaml --weighting my_plugin.my_weighting
  recipe convert old/defaults.yaml old/experiment.yaml --weighting my_plugin --to configs/experiment.toml"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "recipe", help="convert an old YAML file", description=_DESCRIPTION, epilog=_EPILOG
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    convert = actions.add_parser(
        "convert", help="write a recipe from old YAML files", description=_DESCRIPTION, epilog=_EPILOG
    )
    convert.add_argument("old", metavar="OLD", nargs="+", type=Path, help="YAML files; later ones win")
    convert.add_argument(
        "--weighting",
        metavar="USE",
        required=True,
        help="see `plugins list`; which was which: docs/migration.md",
    )
    convert.add_argument("--critic", metavar="USE", help="if the weighting needs one")
    convert.add_argument(
        "--processes",
        metavar="N",
        type=int,
        default=1,
        help="GPUs it ran on: old batches were those of one (1)",
    )
    convert.add_argument("--to", metavar="FILE", type=Path, help="(the last OLD with .toml)")
    return parser


def main(args: argparse.Namespace) -> int:
    """Convert, check and report."""
    from weighted_mtp_core.plan import make_plan
    from weighted_mtp_core.recipe.convert import convert, read_old
    from weighted_mtp_core.storage.manifest import atomic_write

    if args.processes < 1:
        raise WmtpError(f"`--processes {args.processes}`: expected 1 or more")
    to: Path = args.to or args.old[-1].with_suffix(".toml")
    if to.exists():
        raise WmtpError(f"`{to}` is there already", hint="name another file with `--to`")
    old = read_old(args.old, processes=args.processes)
    found = convert(old, weighting=args.weighting, options=_options_of(args.weighting), critic=args.critic)
    to.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(to, found.toml())
    print("moved")
    print_rows([*found.moved], indent="  ")
    print("\ndropped")
    print_rows([*found.dropped], indent="  ")
    print(f"\nwritten to {to}")
    make_plan(to)
    print("it passes `check`")
    return EXIT_DONE


def _options_of(use: str) -> tuple[str, ...]:
    """Return the names of a weighting's options."""
    import attrs

    from weighted_mtp_core.plugins.loading import Kind, find, load, resolve

    _, component = resolve(load(find(), [use.partition(".")[0]]), Kind.WEIGHTING, use)
    return tuple(each.name for each in attrs.fields(component.options))
