"""Backfill: at its start, a run sends data that trackers of other runs of its experiment have not received.

If the process of one of these runs died on this machine before it recorded an outcome, the backfill also
closes that run as KILLED.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.tracking.run_folder import read_run
from weighted_mtp_core.tracking.sync import DIED, run_status, sync_run

_LIMIT_S = 10.0
_ENDED = ("FINISHED", "FAILED", "KILLED")


def start_backfill(experiment: Path, *, skip: Path, log: Callable[[str], None]) -> threading.Thread:
    """Send the pending data of an experiment's earlier runs in a background thread; return the thread.

    Args:
        experiment: The folder of the experiment, `<runs>/<experiment>`.
        skip: The folder of the run that begins or resumes, which is left out.
        log: Called with a line before the pending data of a run are sent, and again after all of them were
            delivered.
    """

    def backfill() -> None:
        for file in sorted(experiment.glob("*/[!.]*/run.json")):
            if file.parent.resolve() != skip.resolve():
                _send(file.parent, log)

    thread = threading.Thread(target=backfill, name="backfill", daemon=True)
    thread.start()
    return thread


def _send(path: Path, log: Callable[[str], None]) -> None:
    logger = logging.getLogger(__name__)
    try:
        found = run_status(path)
        # a run on another machine may still be running, because not all file systems share locks
        died_here = found.status == DIED and read_run(path).get("host") == socket.gethostname()
        waiting = [f"{name.partition('-')[2]}: {each}" for name, each in found.pending.items() if each]
        if not (died_here or (found.status in _ENDED and waiting)):
            return
        if waiting:
            log(f"sending what the trackers of the earlier run `{path.name}` lack ({'; '.join(waiting)})")
        left = sync_run(path, log=logger.info, limit_s=_LIMIT_S, trust=True)
    except (WmtpError, OSError, KeyError, ValueError) as error:
        logger.info("nothing was sent for the earlier run `%s`: %s", path.name, error)
        return
    if waiting and not any(left.values()):
        log(f"sent what the trackers of the earlier run `{path.name}` had not received")
