"""Show and send what trackers have not received.

A run writes all data into its run folder first, and sends the data to trackers from there. `track status`
shows the data that trackers have not received, and the stores that contain each run. `track sync` sends the
data that trackers have not received; if the process of a run died, the run gets the status KILLED. If a
tracker uses another store than before, for example because MLFLOW_TRACKING_URI has changed, `track sync`
sends the whole run.
RUN is a run folder, a run id, or a part of a run id.

examples:
  track status
  track sync 20261123-121856-4f1c9a
  track sync --all
"""

from __future__ import annotations

import argparse

from weighted_mtp_core.cli.arguments import add_actions, add_folder
from weighted_mtp_core.cli.table import print_rows
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.exit_codes import EXIT_DONE, EXIT_RUN_FAILED
from weighted_mtp_core.tracking.run_folder import find_run, find_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    status, sync = add_actions(parser, _status, _sync)
    status.add_argument("run", metavar="RUN", nargs="?", help="only this run")
    which = sync.add_mutually_exclusive_group(required=True)
    which.add_argument("run", metavar="RUN", nargs="?", help="the run")
    which.add_argument("--all", action="store_true", help="every run with pending data or another store")
    sync.add_argument(
        "--limit",
        metavar="SECONDS",
        type=float,
        default=60.0,
        help="stop sending to a tracker that accepts no data for this time (default: 60)",
    )
    for action in (status, sync):
        add_folder(action, "--runs", default="storage/runs")


def _status(args: argparse.Namespace) -> None:
    """Show runs and the data that their trackers have not received."""
    from weighted_mtp_core.tracking.sync import run_status

    paths = [find_run(args.runs, args.run)] if args.run else list(find_runs(args.runs))
    rows = []
    for path in paths:
        found = run_status(path)
        waiting = [
            f"{name.partition('-')[2]}: {pending}" for name, pending in found.pending.items() if pending
        ]
        stores = [
            f"{store} ({'lacks ' + str(pending) if pending else 'complete'})"
            for each in found.stores.values()
            for store, pending in each
        ]
        rows.append((path.name, found.status, "; ".join(waiting) or "-", "; ".join(stores) or "-", str(path)))
    print_rows([("run", "status", "pending", "stores", "folder"), *rows])


def _sync(args: argparse.Namespace) -> int:
    """Send the data that the trackers of a run have not received."""
    from weighted_mtp_core.tracking.sync import run_status, sync_run

    paths = [find_run(args.runs, args.run)] if args.run else list(find_runs(args.runs))
    code = EXIT_DONE
    for path in paths:
        if args.all and run_status(path).status == "RUNNING":
            continue
        try:
            left = sync_run(path, log=print, limit_s=args.limit, trust=args.all)
        except WmtpError as error:
            if not args.all:
                raise
            code = EXIT_RUN_FAILED
            print(f"{path.name}: cannot be sent: {error}")
            continue
        for name, pending in left.items():
            address = name.partition("-")[2]
            if pending:
                code = EXIT_RUN_FAILED
                print(f"{path.name}: `{address}` has not received {pending} ({pending.reason})")
            else:
                print(f"{path.name}: `{address}` is up to date")
    return code
