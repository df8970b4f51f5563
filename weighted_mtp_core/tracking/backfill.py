"""A new run sends what trackers of earlier runs of its experiment did not get."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from attrs import define, field

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.tracking.sync import run_status, sync_run

_LIMIT_S = 10.0
_OVER = ("FINISHED", "FAILED", "KILLED")  # a run that died may be going on where this machine cannot see it


@define(eq=False)
class Backfill:
    """A background thread that looks through the runs of one experiment, once.

    Attributes:
        experiment: The experiment's folder, `<runs>/<experiment>`.
        but: The run folder of the new run.
        log: Tells the person what was sent.
    """

    experiment: Path
    but: Path
    log: Callable[[str], None]
    _thread: threading.Thread = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="earlier-runs", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Wait for it to finish."""
        self._thread.join(seconds)

    def _run(self) -> None:
        for file in sorted(self.experiment.glob("*/*/run.json")):
            if file.parent.absolute() != self.but:
                self._send(file.parent)

    def _send(self, path: Path) -> None:
        log = logging.getLogger(__name__)
        try:
            found = run_status(path)
            if found.status not in _OVER or not any(found.pending.values()):
                return
            left = sync_run(path, log=log.info, limit_s=_LIMIT_S)
        except (WmtpError, OSError, KeyError, ValueError) as error:
            log.info("the earlier run `%s` was left as it is: %s", path.name, error)
            return
        if not any(left.values()):
            self.log(f"sent what trackers of the earlier run `{path.name}` had not got")
