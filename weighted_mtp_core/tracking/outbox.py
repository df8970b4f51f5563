"""The data that one tracker has not received yet.

An outbox contains all lines of the journal from a position on, and earlier lines that wait for a retry.
`Outbox.step` sends the next batch and advances the position. If the tracker's answer was lost, the batch is
sent again, so all methods of a tracker must tolerate repeated calls (`weighted_mtp_core.api.Tracker`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attrs import define, evolve, field

from weighted_mtp_core.api import MetricPoint, RunInfo, RunOutcome, Tracker
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.redaction import redact
from weighted_mtp_core.storage.atomic import sync_to_disk
from weighted_mtp_core.tracking.delivery import (
    POINTS,
    Delivery,
    Pending,
    count_pending,
    lines_between,
    switch_store,
)
from weighted_mtp_core.tracking.journal import Damage, Entry, last_entry, read_journal
from weighted_mtp_core.tracking.run_history import RunHistory, read_history

BATCH = 1000
"""Maximum number of points in one call of a tracker."""

_DESCRIPTION = ("run", "params", "tags", "datasets")
_SLOWEST_UPLOAD = 1e6  # bytes per second


@define(kw_only=True, eq=False)
class Outbox:
    """Sends the journal of a run to one tracker; an outbox may be used by one thread at a time.

    Attributes:
        tracker: The tracker that receives the data.
        folder: The run folder; the paths of artifacts are relative to this folder.
        journal: The journal of the run.
        state: The file that stores the position in the journal.
        reason: Why the tracker is unavailable, as text for the user; empty if no failure is known.
        file_reason: Why the tracker's store of files is unavailable; empty if no failure is known.
        full: Whether the last batch was full, so that more lines may be waiting.
        sent: The amount of data that this outbox has sent.
    """

    tracker: Tracker
    folder: Path
    journal: Path
    state: Path
    reason: str = field(init=False, default="")
    file_reason: str = field(init=False, default="")
    full: bool = field(init=False, default=False)
    sent: Pending = field(init=False, factory=lambda: Pending(lines=0, files=0))
    _delivery: Delivery = field(init=False)
    _notes: list[str] = field(init=False, factory=list)
    _history: RunHistory = field(init=False, factory=RunHistory)
    _info: RunInfo | None = field(init=False, default=None)
    _sent_steps: dict[str, int] = field(init=False, factory=dict)
    _uploading: int = field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        self._delivery = Delivery.read(self.state, self.journal)

    def open(self) -> None:
        """Open the run at the tracker, with the description of the run that the journal contains so far.

        Raises:
            WmtpError: The tracker permanently refuses the run, or the journal is missing or does not name the
                run.
            Exception: The tracker raised this exception, so the run was not opened.
        """
        history = read_history(self.folder, kinds=_DESCRIPTION)
        info = history.info(self.folder)
        self.tracker.start(info)
        self._check_store()
        self._history, self._info, self._sent_steps = history, info, {}
        end = last_entry(self.journal)
        if end is None or end.kind != "status" or end.start in self._delivery.aside:
            return
        if end.end <= self._delivery.position:
            self._delivery.aside.append(end.start)  # because opening has set the run's status to running

    def _check_store(self) -> None:
        """Use the delivery to the current store; send the whole run again if the store has lost data."""
        store, kept = self.tracker.store(), self.tracker.kept()
        before = self._delivery
        if before.store and store != before.store:
            self._notes.append(f"now uses `{store}`; the run was sent to `{before.store}` before")
            self._delivery = switch_store(before, store, state=self.state, journal=self.journal)
        if kept is not None:
            if lost := self._delivery.lost_by(kept, self.journal):
                self._notes.append(f"{lost}; the whole run is sent again to `{store}`")
                self._delivery = Delivery()
            self._delivery.run = kept.run
        if store or kept is not None:
            self._delivery.store = store
            self._delivery.write(self.state)

    def _is_lost(self) -> bool:
        """Return whether the store no longer has the run, or has lost points that this outbox has sent."""
        kept = self.tracker.kept()
        return kept is not None and (
            kept.run != self._delivery.run
            or any(kept.last_step.get(name, -1) < step for name, step in self._sent_steps.items())
        )

    def step(self) -> bool:
        """Send the next batch of lines; if the run is not open at the tracker, first open it.

        Before metrics, timings or the end of the run are sent, the store is asked what it has received. If
        the store has lost the run or points, the run is opened again instead. If the upload of a file fails,
        no exception is raised, and the file is set aside. A batch that the tracker permanently refuses is
        recorded as refused.

        Returns:
            Whether there was anything to send.

        Raises:
            WmtpError: The run had to be opened, and `open` raised this error.
            Exception: The tracker raised this exception, so the batch was not delivered and must be sent
                again.
        """
        if self._info is None:
            self.open()
        batch = self._next_batch()
        if not batch:
            return False
        if batch[0].kind in {*POINTS, "status"} and self._is_lost():
            self.open()
            return True
        sync_to_disk(self.journal)  # otherwise a power cut could lose lines that a tracker has received
        first = batch[0]
        try:
            self._send(batch)
        except WmtpError as error:
            self._refuse(batch, error)
        except Exception as error:
            if first.kind != "artifact":
                raise
            self.file_reason = one_line(error)
            self._delivery.aside.append(first.start)  # a file that fails must not delay later lines
            self._notes.append(
                f"cannot store `{first.fields['path']}` now ({self.file_reason}); the file is sent later"
            )
        self._delivery.position = batch[-1].end
        self._delivery.write(self.state)
        return True

    def retry_aside(self) -> bool:
        """Send again the lines that were set aside, up to the first file that fails again.

        If the upload of a file fails, no exception is raised, and the file remains set aside. A line that the
        tracker permanently refuses is no longer set aside.

        Returns:
            Whether any line was delivered or permanently refused.

        Raises:
            Exception: The tracker raised this exception for a line that does not name a file to upload.
        """
        delivered = False
        lines = (next(read_journal(self.journal, start)) for start in self._delivery.aside)
        entries = [line for line in lines if isinstance(line, Entry)]
        for entry in sorted(entries, key=lambda entry: entry.kind == "artifact"):
            try:
                self._send([entry])
            except WmtpError as error:
                self._refuse([entry], error)
            except Exception as error:
                if entry.kind != "artifact":
                    raise
                self.file_reason = one_line(error)
                break
            else:
                if entry.kind == "artifact":
                    self.file_reason = ""
                    self._notes.append(f"has `{entry.fields['path']}` now")
            delivered = True
            self._delivery.aside.remove(entry.start)
            self._delivery.write(self.state)
        return delivered

    def _refuse(self, batch: Sequence[Entry], error: WmtpError) -> None:
        self._delivery.refused.append((batch[0].start, batch[-1].end))
        hint = f"; {error.hint}" if error.hint else ""
        self._notes.append(redact(f"refused {_what(batch)}: {error}{hint}"))

    def take_notes(self) -> list[str]:
        """Return the messages since the last call, to which the caller prepends the name of the tracker."""
        taken, self._notes = self._notes, []
        return taken

    @property
    def waiting(self) -> bool:
        """Whether any lines are set aside for a retry."""
        return bool(self._delivery.aside)

    def allowance_s(self) -> float:
        """Return the seconds that the file being uploaded adds to the limit of `RetryingUploader.close`."""
        return self._uploading / _SLOWEST_UPLOAD

    def pending(self) -> Pending:
        """Return the amount of data that has not been delivered, and the reason."""
        return evolve(count_pending(self.journal, self.state), reason=self.reason or self.file_reason)

    def retry_refused(self) -> None:
        """Set refused lines aside for a retry, which may succeed if a limit of the tracker was raised."""
        refused, self._delivery.refused = self._delivery.refused, []
        for start, end in refused:
            self._delivery.aside += [line.start for line in lines_between(self.journal, start, end)]
        self._delivery.write(self.state)

    def _next_batch(self) -> list[Entry]:
        batch: list[Entry] = []
        points = 0
        for line in read_journal(self.journal, self._delivery.position):
            if isinstance(line, Damage):
                if batch:
                    break
                self._notes.append(f"skips bytes {line.start} to {line.end} of the journal: damaged")
                self._delivery.position = line.end
                continue
            together = line.kind in POINTS
            if batch and not together:
                break
            batch.append(line)
            points += len(line.fields["metrics"]) if together else BATCH
            if points >= BATCH:
                break
        self.full = points >= BATCH
        return batch

    def _send(self, batch: Sequence[Entry]) -> None:
        first = batch[0]
        match first.kind:
            case "metrics" | "timings":
                points = [point for entry in batch for point in to_points(entry)]
                for start in range(0, len(points), BATCH):
                    self.tracker.log_metrics(points[start : start + BATCH])
                self._sent_steps |= {point.name: point.step for point in points}
            case "tags":
                self.tracker.set_tags(first.fields["tags"])
            case "artifact":
                self._store(first)
            case "status":
                self.tracker.finish(RunOutcome(first.fields["status"]), time_ms=first.time_ms)
            case "run" | "params" | "datasets":
                self._describe_again(first)
            case _:
                raise RunFailedError(f"this release cannot send lines of the kind `{first.kind}`")
        sent, files = self.sent, int(first.kind == "artifact")
        self.sent = Pending(lines=sent.lines + len(batch) - files, files=sent.files + files)

    def _describe_again(self, entry: Entry) -> None:
        self._history.add(entry)
        info = self._history.info(self.folder)
        if info != self._info:
            self.tracker.start(info)
            self._info = info

    def _store(self, entry: Entry) -> None:
        path = self.folder / entry.fields["path"]
        if not path.is_file():
            raise RunFailedError(f"`{path}` no longer exists")
        self._uploading = path.stat().st_size
        try:
            self.tracker.log_artifact(path, entry.fields["subdir"])
        finally:
            self._uploading = 0


def one_line(error: BaseException) -> str:
    """Return an exception as one short line without secrets."""
    text = " ".join(redact(str(error)).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def to_points(entry: Entry) -> list[MetricPoint]:
    """Return the finite values of a line of metrics or timings; other values are not sent to trackers."""
    return [
        MetricPoint(name=name, value=value, step=entry.fields["step"], time_ms=entry.time_ms)
        for name, value in entry.fields["metrics"].items()
        if not isinstance(value, str)
    ]


def _what(batch: Sequence[Entry]) -> str:
    first, last = batch[0], batch[-1]
    if first.kind in POINTS:
        return f"the metrics of steps {first.fields['step']} to {last.fields['step']}"
    if first.kind == "artifact":
        return f"the file `{first.fields['path']}`"
    return f"a line of the kind `{first.kind}`"
