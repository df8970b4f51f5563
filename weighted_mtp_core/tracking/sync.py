"""After a run: what its trackers have not got, and sending it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from attrs import frozen

from weighted_mtp_core.api import RunOutcome
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.plan import make_plan
from weighted_mtp_core.tracking.journal import Journal
from weighted_mtp_core.tracking.outbox import Pending, count_pending, last_entry
from weighted_mtp_core.tracking.retrying_uploader import RetryingUploader
from weighted_mtp_core.tracking.run_folder import RunFolder, is_held, read_run
from weighted_mtp_core.tracking.trackers import build_trackers

DIED = "DIED"
"""The status of a run whose process ended without a word: killed, or the machine went down."""


@frozen(kw_only=True)
class RunStatus:
    """One run as its folder tells it.

    Attributes:
        path: The run folder.
        status: RUNNING, FINISHED, FAILED, KILLED or DIED.
        pending: By tracker, what it has not got.
    """

    path: Path
    status: str
    pending: Mapping[str, Pending]


def run_status(path: Path) -> RunStatus:
    """Read what a run folder says about itself; contacts nobody."""
    facts = read_run(path)
    status = facts["status"]
    if status == "RUNNING" and not is_held(path):
        status = DIED
    folder = RunFolder(path=path)
    pending = {
        name: count_pending(folder.journal, folder.delivery(name)) for name in facts.get("trackers", ())
    }
    return RunStatus(path=path, status=status, pending=pending)


def sync_run(path: Path, *, log: Callable[[str], None], limit_s: float) -> Mapping[str, Pending]:
    """Send what a run's trackers have not got, also what they refused before.

    A run that died is closed as KILLED, at the time of its last line.

    Args:
        path: The run folder.
        log: Tells the person.
        limit_s: How long to wait for a tracker that takes nothing.

    Returns:
        By tracker, what it still has not got.

    Raises:
        WmtpError: The run is going on, its recipe cannot be used any more, or a tracker will never take it.
    """
    folder = RunFolder.open(path)
    try:
        _close_the_dead(folder)
        left = {}
        for name, tracker in build_trackers(make_plan(folder.recipe)).items():
            if not count_pending(folder.journal, folder.delivery(name)):
                continue
            delivery = RetryingUploader.to(tracker, name, folder, log=log)
            delivery.outbox.try_refused_again()
            delivery.start()
            left[name] = delivery.close(limit_s)
        return left
    finally:
        folder.close()


def amend_run(
    path: Path, *, tags: Mapping[str, str], outcome: RunOutcome | None, log: Callable[[str], None]
) -> None:
    """Add tags to a run that is over, change its outcome unless that is None, and send it.

    Raises:
        WmtpError: The run is going on, or a tracker will never take it.
    """
    folder = RunFolder.open(path)
    try:
        _close_the_dead(folder)
        end = last_entry(folder.journal)
        if end is None:
            raise WmtpError(f"the run `{path}` has an empty journal")
        status = outcome or RunOutcome(end.fields["status"])
        journal = Journal(folder.journal)
        journal.append("tags", {"tags": dict(tags)})
        journal.append("status", {"status": status.value}, time_ms=end.time_ms)
        journal.close()
        folder.record(status=status.value)
    finally:
        folder.close()
    for name, pending in sync_run(path, log=log, limit_s=30).items():
        if pending:
            log(f"`{name.partition('-')[2]}` did not get {pending}; it is kept: track sync {path}")


def _close_the_dead(folder: RunFolder) -> None:
    """Write the end that a killed process could not write."""
    last = last_entry(folder.journal)
    if last is None or last.kind == "status":
        return
    journal = Journal(folder.journal)
    if folder.log.is_file():
        log = folder.log.relative_to(folder.path).as_posix()
        journal.append("artifact", {"path": log, "subdir": "logs"}, time_ms=last.time_ms)
    journal.append("status", {"status": RunOutcome.KILLED.value}, time_ms=last.time_ms)
    journal.close()
    folder.record(status=RunOutcome.KILLED.value, ended_ms=last.time_ms)
