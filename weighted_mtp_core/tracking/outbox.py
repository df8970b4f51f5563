"""What one tracker has not got yet: the journal from a position on, and files that could not be stored.

`step` sends the next batch and moves the position. A batch whose answer was lost is sent again, so trackers
must bear repetition (`weighted_mtp_core.api.Tracker`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import chain, takewhile
from pathlib import Path

from attrs import asdict, define, evolve, field, frozen

from weighted_mtp_core.api import DatasetVersion, MetricPoint, RunInfo, RunOutcome, Tracker
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.redaction import redact
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.tracking.journal import Damage, Entry, read_journal

BATCH = 1000
"""The most points that a tracker gets at once."""

_DESCRIBING = ("run", "params", "tags", "datasets")
_POINTS = ("metrics", "timings")
_SLOWEST_UPLOAD = 1e6  # bytes a second


@frozen(kw_only=True)
class Pending:
    """What a tracker has not got: lines of the journal, files, and why (empty: nothing failed)."""

    lines: int
    files: int
    reason: str

    def __bool__(self) -> bool:
        return self.lines > 0 or self.files > 0

    def __str__(self) -> str:
        counts = {"journal line": self.lines, "file": self.files}
        return " and ".join(f"{n} {noun}{'s' * (n > 1)}" for noun, n in counts.items() if n) or "nothing"


@define(kw_only=True, eq=False)
class _Kept:
    """How far a delivery has come.

    Attributes:
        position: Where the next line to send begins.
        aside: Where lines before it begin that are to be sent again.
        refused: From where to where lines lie that the tracker will not take.
    """

    position: int = 0
    aside: list[int] = field(factory=list)
    refused: list[tuple[int, int]] = field(factory=list)

    @classmethod
    def read(cls, state: Path, journal: Path) -> _Kept:
        if not state.is_file():
            return cls()
        kept = cls(**json.loads(state.read_text(encoding="utf-8")))
        # the end of the journal may be gone: a disk that filled up, a line cut off after a kill
        kept.position = min(kept.position, journal.stat().st_size)
        kept.aside = [start for start in kept.aside if start < kept.position]
        kept.refused = [(start, end) for start, end in kept.refused if end <= kept.position]
        return kept

    def write(self, state: Path) -> None:
        state.parent.mkdir(exist_ok=True)
        atomic_write(state, json.dumps(asdict(self)) + "\n")


@define(kw_only=True, eq=False)
class Outbox:
    """Sends a run's journal to one tracker; used by one thread at a time.

    Attributes:
        tracker: Where to.
        folder: The run folder; artifacts are named relative to it.
        journal: The journal in it.
        state: Where the position is kept.
        reason: Why the tracker is away, for people; empty while it is not.
        file_reason: The same for its store of files.
        full: Whether the last batch was a full one, so that more may be waiting.
    """

    tracker: Tracker
    folder: Path
    journal: Path
    state: Path
    reason: str = field(init=False, default="")
    file_reason: str = field(init=False, default="")
    full: bool = field(init=False, default=False)
    _kept: _Kept = field(init=False)
    _notes: list[str] = field(init=False, factory=list)
    _info: RunInfo | None = field(init=False, default=None)
    _uploading: int = field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        self._kept = _Kept.read(self.state, self.journal)

    def open(self) -> None:
        """Open the run at the tracker, described by all that the journal knows of it by now."""
        info = describe(self.journal, self.folder)
        self.tracker.start(info)
        self._info = info
        end = last_entry(self.journal)
        if end is not None and end.kind == "status" and end.end <= self._kept.position:
            self._kept.aside.append(end.start)  # opening made the run a running one again

    def step(self) -> bool:
        """Send the next batch of lines.

        Returns:
            Whether there was anything to send.

        Raises:
            Exception: Whatever the tracker raised: not delivered, to be repeated.
        """
        if self._info is None:
            self.open()
        batch = self._next_batch()
        if not batch:
            return False
        self._sync_journal()
        self._send_or_refuse(batch)
        self._kept.position = batch[-1].end
        self._kept.write(self.state)
        return True

    def _send_or_refuse(self, batch: Sequence[Entry]) -> None:
        try:
            self._send(batch)
        except WmtpError as error:
            self._refuse(batch, error)

    def _refuse(self, batch: Sequence[Entry], error: WmtpError) -> None:
        self._kept.refused.append((batch[0].start, batch[-1].end))
        hint = f"; {error.hint}" if error.hint else ""
        self._notes.append(redact(f"refused {_what(batch)}: {error}{hint}"))

    def take_notes(self) -> list[str]:
        """Return what a person should know and was not told yet; each follows the tracker's name."""
        taken, self._notes = self._notes, []
        return taken

    @property
    def waiting(self) -> bool:
        """Whether something was set aside."""
        return bool(self._kept.aside)

    def allowance_s(self) -> float:
        """Return how long the file that is being stored may take beyond the usual patience."""
        return self._uploading / _SLOWEST_UPLOAD

    def pending(self) -> Pending:
        """Count what is not delivered."""
        return evolve(count_pending(self.journal, self.state), reason=self.reason or self.file_reason)

    def try_refused_again(self) -> None:
        """Take up what was refused before: somebody may have raised a limit since."""
        refused, self._kept.refused = self._kept.refused, []
        for start, end in refused:
            self._kept.aside += [entry.start for entry in _between(self.journal, start, end)]
        self._kept.write(self.state)

    def _next_batch(self) -> list[Entry]:
        batch: list[Entry] = []
        points = 0
        for entry in read_journal(self.journal, self._kept.position):
            if isinstance(entry, Damage):
                if batch:
                    break
                self._notes.append(f"does not get bytes {entry.start} to {entry.end} of the journal: damaged")
                self._kept.position = entry.end
                continue
            together = entry.kind in _POINTS
            if batch and not together:
                break
            batch.append(entry)
            points += len(entry.fields["metrics"]) if together else BATCH
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
            case "tags":
                self.tracker.set_tags(first.fields["tags"])
            case "artifact":
                self._store_or_set_aside(first)
            case "status":
                self.tracker.finish(RunOutcome(first.fields["status"]), time_ms=first.time_ms)
            case "run" | "params" | "datasets":
                self._describe_again(first)
            case _:
                raise RunFailedError(f"this release does not know lines of the kind `{first.kind}`")

    def _describe_again(self, entry: Entry) -> None:
        if self._info is None:
            raise AssertionError("lines are sent after `open`")
        info = fold(self._info, entry)
        if info != self._info:
            self.tracker.start(info)
            self._info = info

    def _store_or_set_aside(self, entry: Entry) -> None:
        """Store a file; one that fails must not hold up the lines behind it."""
        try:
            self._store(entry)
        except WmtpError:
            raise
        except Exception as error:  # noqa: BLE001 - by contract any exception means "not delivered"
            self._kept.aside.append(entry.start)
            self.file_reason = one_line(error)
            self._notes.append(
                f"cannot store `{entry.fields['path']}` yet ({self.file_reason}); it is kept and sent later"
            )

    def retry_aside(self) -> bool:
        """Try once more what was set aside, up to the first file that fails.

        Returns:
            Whether anything got through.

        Raises:
            Exception: Whatever the tracker raised for a line; a file that fails only waits longer.
        """
        delivered = False
        for entry in sorted(self._aside_entries(), key=lambda entry: entry.kind == "artifact"):
            if entry.kind != "artifact":
                self._send_or_refuse([entry])
            elif not self._try_to_store(entry):
                break
            delivered = True
            self._kept.aside.remove(entry.start)
            self._kept.write(self.state)
        return delivered

    def _aside_entries(self) -> list[Entry]:
        entries = (next(read_journal(self.journal, start)) for start in self._kept.aside)
        return [entry for entry in entries if isinstance(entry, Entry)]

    def _try_to_store(self, entry: Entry) -> bool:
        try:
            self._store(entry)
        except WmtpError as error:
            self._refuse([entry], error)
        except Exception as error:  # noqa: BLE001 - by contract any exception means "not delivered"
            self.file_reason = one_line(error)
            return False
        else:
            self.file_reason = ""
            self._notes.append(f"has `{entry.fields['path']}` now")
        return True

    def _store(self, entry: Entry) -> None:
        path = self.folder / entry.fields["path"]
        if not path.is_file():
            raise RunFailedError(f"`{path}` is gone")
        self._uploading = path.stat().st_size
        try:
            self.tracker.log_artifact(path, entry.fields["subdir"])
        finally:
            self._uploading = 0

    def _sync_journal(self) -> None:
        """What a tracker gets must outlive a power cut here too, or a resumed run would send it twice."""
        descriptor = os.open(self.journal, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def count_pending(journal: Path, state: Path) -> Pending:
    """Count what a tracker has not got, from the files alone."""
    kept = _Kept.read(state, journal)
    aside = (next(read_journal(journal, start)) for start in kept.aside)
    refused = (_between(journal, start, end) for start, end in kept.refused)
    lines = files = 0
    for entry in chain(read_journal(journal, kept.position), aside, *refused):
        if isinstance(entry, Entry):
            files += entry.kind == "artifact"
            lines += entry.kind != "artifact"
    return Pending(lines=lines, files=files, reason="")


def _between(journal: Path, start: int, end: int) -> Iterator[Entry | Damage]:
    return takewhile(lambda entry: entry.end <= end, read_journal(journal, start))


def one_line(error: BaseException) -> str:
    """Return an exception as one short line without secrets."""
    text = " ".join(redact(str(error)).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def last_entry(journal: Path) -> Entry | None:
    """Return the last undamaged line."""
    last = None
    for entry in read_journal(journal):
        if isinstance(entry, Entry):
            last = entry
    return last


def describe(journal: Path, folder: Path) -> RunInfo:
    """Return the run as its journal describes it.

    Raises:
        WmtpError: The journal does not begin with a run.
    """
    info: RunInfo | None = None
    for entry in read_journal(journal, kinds=_DESCRIBING):
        if isinstance(entry, Entry) and entry.kind == "run":
            info = RunInfo(
                run_id=entry.fields["run_id"],
                name=entry.fields["name"],
                experiment=entry.fields["experiment"],
                params={},
                tags={},
                datasets=(),
                folder=folder,
                started_ms=entry.time_ms,
            )
        elif isinstance(entry, Entry) and info is not None:
            info = fold(info, entry)
    if info is None:
        raise WmtpError(f"the journal `{journal}` does not begin with a line of the kind `run`")
    return info


def fold(info: RunInfo, entry: Entry) -> RunInfo:
    """Return the run as it is known after one more line."""
    match entry.kind:
        case "params":
            return evolve(info, params={**info.params, **entry.fields["params"]})
        case "tags":
            return evolve(info, tags={**info.tags, **entry.fields["tags"]})
        case "datasets":
            datasets = tuple(DatasetVersion(**dataset) for dataset in entry.fields["datasets"])
            return evolve(info, datasets=datasets)
        case _:
            return info


def to_points(entry: Entry) -> list[MetricPoint]:
    """Return the finite values of one line; `nan` and `inf` are strings in the journal and stay there."""
    return [
        MetricPoint(name=name, value=value, step=entry.fields["step"], time_ms=entry.time_ms)
        for name, value in entry.fields["metrics"].items()
        if not isinstance(value, str)
    ]


def _what(batch: Sequence[Entry]) -> str:
    first, last = batch[0], batch[-1]
    if first.kind in _POINTS:
        return f"the metrics of steps {first.fields['step']} to {last.fields['step']}"
    if first.kind == "artifact":
        return f"the file `{first.fields['path']}`"
    return f"a line of the kind `{first.kind}`"
