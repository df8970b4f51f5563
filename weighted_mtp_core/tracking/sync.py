"""Read the state of runs from their folders, and send data of ended runs that trackers have not received.

`track status`, `track sync` and the backfill at the start of a run use this module. `amend_run` also changes
the tags and the outcome of an ended run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from attrs import frozen

from weighted_mtp_core.api import RunOutcome
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import python_command
from weighted_mtp_core.plan import make_plan
from weighted_mtp_core.tracking.delivery import Delivery, Pending, count_pending, deliveries
from weighted_mtp_core.tracking.journal import Entry, Journal, last_entry, read_journal
from weighted_mtp_core.tracking.retrying_uploader import RetryingUploader
from weighted_mtp_core.tracking.run_folder import RunFolder, is_held, read_run
from weighted_mtp_core.tracking.trackers import build_trackers

DIED = "DIED"
"""The status of a run that could not record its end, because its process was killed or the machine failed."""


@frozen(kw_only=True)
class RunStatus:
    """The state of one run according to its folder.

    Attributes:
        path: The run folder.
        status: One of RUNNING, FINISHED, FAILED, KILLED and DIED.
        pending: The amount of data that each tracker has not received, with the keys of `build_trackers`.
        stores: For each tracker, the stores that it has used, with the amount of data that each store has not
            received; the current store comes first.
    """

    path: Path
    status: str
    pending: Mapping[str, Pending]
    stores: Mapping[str, Sequence[tuple[str, Pending]]]


def run_status(path: Path) -> RunStatus:
    """Read the state of a run from its folder, without contacting any tracker.

    Raises:
        WmtpError: The file system of the folder does not support locks.
    """
    facts = read_run(path)
    status = facts["status"]
    if status == "RUNNING" and not is_held(path):
        status = DIED
    folder = RunFolder(path=path)
    trackers = facts.get("trackers", ())
    return RunStatus(
        path=path,
        status=status,
        pending={name: count_pending(folder.journal, folder.delivery(name)) for name in trackers},
        stores={name: deliveries(folder.delivery(name), folder.journal) for name in trackers},
    )


def sync_run(
    path: Path, *, log: Callable[[str], None], limit_s: float, trust: bool = False
) -> Mapping[str, Pending]:
    """Send the data that the trackers of a run have not received, including data that they refused before.

    If the process of the run died before it recorded an outcome, the run is first closed as KILLED, at the
    time of the last line in its journal.
    The whole run is sent again if a tracker now uses a store that has never received the run, or if the store
    of a tracker has lost data of the run.

    Args:
        path: The run folder.
        log: Called with messages for the user.
        limit_s: Seconds to wait for a tracker that does not accept data.
        trust: Whether to skip trackers that have received all data according to the run folder.

    Returns:
        The amount of data that each contacted tracker still has not received.

    Raises:
        WmtpError: The folder does not exist, the run is still running, the recipe of the run is no longer
            valid, or a tracker cannot be built or permanently refuses the run.
    """
    folder = RunFolder.open(path)
    try:
        _close_if_died(folder)
        left: dict[str, Pending] = {}
        if last_entry(folder.journal) is None:
            return left
        for name, tracker in build_trackers(make_plan(folder.recipe)).items():
            state = folder.delivery(name)
            is_same_store = Delivery.read(state, folder.journal).store in {"", tracker.store()}
            if trust and is_same_store and not count_pending(folder.journal, state):
                continue
            uploader = RetryingUploader.to(tracker, name, folder, log=log)
            uploader.outbox.retry_refused()
            uploader.start()
            left[name] = uploader.close(limit_s)
            log(f"sent {uploader.outbox.sent} to `{tracker.store() or uploader.name}`")
        return left
    finally:
        folder.close()


def amend_run(
    path: Path, *, tags: Mapping[str, str], outcome: RunOutcome | None, log: Callable[[str], None]
) -> None:
    """Add tags to a run that has ended, change its outcome, and send tags and outcome to the trackers.

    Args:
        path: The run folder.
        tags: The tags to add.
        outcome: The new outcome of the run; None restores the outcome with which the run itself ended.
        log: Called with messages for the user.

    Raises:
        WmtpError: The journal of the run is empty, or `sync_run` would refuse the run.
    """
    folder = RunFolder.open(path)
    try:
        _close_if_died(folder)
        end = last_entry(folder.journal)
        if end is None:
            raise WmtpError(f"the run `{path}` has an empty journal")
        status = outcome or _own_outcome(folder.journal)
        journal = Journal(folder.journal)
        journal.append("tags", {"tags": dict(tags)})
        journal.append("status", {"status": status.value}, time_ms=end.time_ms)
        journal.close()
        folder.record(status=status.value)
    finally:
        folder.close()
    for name, pending in sync_run(path, log=log, limit_s=30).items():
        if pending:
            again = python_command("weighted_mtp_core", "track", "sync", str(path))
            log(f"`{name.partition('-')[2]}` has not received {pending}; it is kept: {again}")


def _own_outcome(journal: Path) -> RunOutcome:
    """Return how the run itself ended; outcomes directly after tags come from `amend_run` and are ignored."""
    status, before = RunOutcome.KILLED, ""
    for line in read_journal(journal):
        if isinstance(line, Entry):
            if line.kind == "status" and before != "tags":
                status = RunOutcome(line.fields["status"])
            before = line.kind
    return status


def _close_if_died(folder: RunFolder) -> None:
    """Write the end of a run to its journal and its folder if the process of the run could not do so."""
    last = last_entry(folder.journal)
    begun_ms = read_run(folder.path).get("started_ms", 0)
    status, ended_ms = RunOutcome.KILLED.value, begun_ms if last is None else last.time_ms
    if last is not None and last.kind == "status":
        status = last.fields["status"]
    elif last is not None:
        journal = Journal(folder.journal)
        if folder.log.is_file():
            log = folder.log.relative_to(folder.path).as_posix()
            journal.append("artifact", {"path": log, "subdir": "logs"}, time_ms=ended_ms)
        journal.append("status", {"status": status}, time_ms=ended_ms)
        journal.close()
    if read_run(folder.path).get("status") != status:
        folder.record(status=status, ended_ms=ended_ms)
