"""Write the page that shows a run.

The command writes `report.html` into the run folder and prints the path of this file. The page shows curves,
heads, critic and tokens of the run, and needs no network. Every run writes its page at its end; the command
writes the page again, or writes the page of a run that ended early.

examples:
  report 20261123-140924
  report storage/runs/weighted_mtp/my_plugin/my_run/20261123-140924-0b4a16
"""

from __future__ import annotations

import argparse

from weighted_mtp_core.cli.arguments import add_run_arguments
from weighted_mtp_core.tracking.run_folder import find_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)


def main(args: argparse.Namespace) -> None:
    from weighted_mtp_core.report.page import write_report

    print(write_report(find_run(args.runs, args.run)))
