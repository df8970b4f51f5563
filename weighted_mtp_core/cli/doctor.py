"""`doctor`: the operations checklist, tried for real."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from weighted_mtp_core.exit_codes import EXIT_DONE, EXIT_RUN_FAILED
from weighted_mtp_core.redaction import redact

_DESCRIPTION = """\
Try everything that a run needs on this machine: .env, plugins, disk, device, sandbox, the tracking
server and its login, the artifact store, the clock. Shows no secret. Exit code 1 if something is
missing that a run needs."""
_EPILOG = """\
examples:
  doctor                               with the tracker that is configured
  doctor configs/my_recipe.toml        with the trackers of a recipe"""
_TICKS = {"ok": "✓", "warning": "!", "FAILED": "✗"}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor", help="try what a run needs on this machine", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", type=Path, help="a TOML file")
    return parser


def main(args: argparse.Namespace) -> int:
    """Print the checklist."""
    from weighted_mtp_core.builtin.mlflow import MlflowOptions
    from weighted_mtp_core.doctor import examine
    from weighted_mtp_core.plan import make_plan

    storage, every = Path("storage"), [MlflowOptions()]
    if args.recipe is not None:
        plan = make_plan(args.recipe)
        storage = Path(plan.recipe.run.storage)
        every = [each.options for each in plan.trackers if isinstance(each.options, MlflowOptions)]
    code = EXIT_DONE
    seen = set()
    for options in every or [MlflowOptions(enabled=False)]:
        for finding in examine(options, storage):
            if finding in seen:
                continue
            seen.add(finding)
            line = f"{_TICKS[finding.mark]} {finding.mark:<7} {finding.name}: {finding.text}"
            print(redact(line), flush=True)
            if finding.hint:
                print(redact(f"          hint: {finding.hint}"))
            if finding.mark == "FAILED":
                code = EXIT_RUN_FAILED
    return code
