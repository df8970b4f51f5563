"""Backfill: a new run sends what the trackers of earlier runs of its experiment did not receive."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.tracking.sync import run_status, sync_run

_LIMIT_S = 10.0
_ENDED = ("FINISHED", "FAILED", "KILLED")  # a run that died here may still be running on another machine


def start_backfill(experiment: Path, *, skip: Path, log: Callable[[str], None]) -> threading.Thread:
    """Go through the runs of one experiment once, in a background thread that is returned.

    Args:
        experiment: The experiment's folder, `<runs>/<experiment>`.
        skip: The run folder of the new run.
        log: Receives a line for each run that was sent.
    """

    def backfill() -> None:
        for file in sorted(experiment.glob("*/*/run.json")):
            if file.parent.absolute() != skip:
                _send(file.parent, log)

    thread = threading.Thread(target=backfill, name="backfill", daemon=True)
    thread.start()
    return thread


def _send(path: Path, log: Callable[[str], None]) -> None:
    logger = logging.getLogger(__name__)
    try:
        found = run_status(path)
        if found.status not in _ENDED or not any(found.pending.values()):
            return
        left = sync_run(path, log=logger.info, limit_s=_LIMIT_S)
    except (WmtpError, OSError, KeyError, ValueError) as error:
        logger.info("nothing was sent for the earlier run `%s`: %s", path.name, error)
        return
    if not any(left.values()):
        log(f"sent what the trackers of the earlier run `{path.name}` had not received")
