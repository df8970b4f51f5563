"""`report`: write the page that shows a run, from the files in its folder."""

from __future__ import annotations

import argparse
from typing import Any

from weighted_mtp_core.cli.run_arguments import add_run_arguments
from weighted_mtp_core.exit_codes import EXIT_DONE

_DESCRIPTION = """\
Write `report.html` into a run folder and print its path: curves, heads, critic and tokens of a run on one
page that needs no network. Every run writes it at its end; this command writes it again, or for a run that
ended early."""
_EPILOG = """\
examples:
  report 20261123-140924
  report storage/runs/weighted_mtp/my_plugin/my_run/20261123-140924-0b4a16"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report", help="write the page that shows a run", description=_DESCRIPTION, epilog=_EPILOG
    )
    add_run_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    """Write the page."""
    from weighted_mtp_core.report.page import write_report
    from weighted_mtp_core.tracking.run_folder import find_run

    print(write_report(find_run(args.runs, args.run)))
    return EXIT_DONE
