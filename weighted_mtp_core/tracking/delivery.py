"""Record how much of a run's journal a store has received.

The file `delivery/<tracker>.json` in the run folder records the delivery to the current store of a tracker.
Each delivery belongs to one store and to one run in this store. If a tracker is configured for another store,
the delivery to the previous store is saved in a separate file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import chain, takewhile
from pathlib import Path

from attrs import asdict, define, field, frozen

from weighted_mtp_core.api import KeptRun
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.tracking.journal import Damage, Entry, read_journal

POINTS = ("metrics", "timings")


@frozen(kw_only=True)
class Pending:
    """An amount of data, usually data that a tracker has not received: lines of the journal, and files.

    `reason` is the error that stops the upload, as text. It is empty if no error stops the upload, and always
    empty in the result of `count_pending`, which only reads files.
    """

    lines: int
    files: int
    reason: str = ""

    def __bool__(self) -> bool:
        return self.lines > 0 or self.files > 0

    def __str__(self) -> str:
        counts = {"journal line": self.lines, "file": self.files}
        return " and ".join(f"{n} {noun}{'s' * (n > 1)}" for noun, n in counts.items() if n) or "nothing"


@define(kw_only=True, eq=False)
class Delivery:
    """The state of the upload to one store.

    Attributes:
        store: The address of the store, without secrets; empty if the run was not opened at the tracker yet,
            or if the tracker does not report an address.
        run: The id of the run in the store; empty if the run was not opened there yet, or if the tracker does
            not report this id.
        position: Byte position, in the journal, of the next line to send.
        aside: Byte positions of earlier lines of the journal that must be sent again.
        refused: Byte ranges of lines that the tracker has refused permanently.
    """

    store: str = ""
    run: str = ""
    position: int = 0
    aside: list[int] = field(factory=list)
    refused: list[tuple[int, int]] = field(factory=list)

    @classmethod
    def read(cls, state: Path, journal: Path) -> Delivery:
        """Read a delivery from the file `state`; if there is no such file, nothing has been delivered."""
        if not state.is_file():
            return cls()
        found = cls(**json.loads(state.read_text(encoding="utf-8")))
        # the end of the journal may be missing after a full disk or after a kill in the middle of a line
        found.position = min(found.position, journal.stat().st_size)
        found.aside = [start for start in found.aside if start < found.position]
        found.refused = [(start, end) for start, end in found.refused if end <= found.position]
        return found

    def write(self, state: Path) -> None:
        """Write this delivery to the file `state`."""
        state.parent.mkdir(exist_ok=True)
        atomic_write(state, json.dumps(asdict(self)) + "\n")

    def lost_by(self, kept: KeptRun, journal: Path) -> str:
        """Describe what a store has received but lost: the run, or points of metrics.

        The text is empty if nothing is lost. Data are lost, for example, if the run is deleted or the store's
        database is restored from an older copy.

        Args:
            kept: The part of the run that the store contains.
            journal: The journal of the run.
        """
        if not self.position:
            return ""
        if self.run and kept.run != self.run:
            return f"no longer has the run `{self.run}`"
        sent: dict[str, int] = {}
        for line in read_journal(journal, kinds=POINTS):
            if isinstance(line, Damage) or any(start <= line.start < end for start, end in self.refused):
                continue
            if line.end > self.position:
                break
            finite = (name for name, value in line.fields["metrics"].items() if not isinstance(value, str))
            sent.update(dict.fromkeys(finite, line.fields["step"]))
        lost = [name for name, step in sent.items() if kept.last_step.get(name, -1) < step]
        return f"has lost steps of {len(lost)} metrics, such as `{lost[0]}`" if lost else ""


def switch_store(delivery: Delivery, store: str, *, state: Path, journal: Path) -> Delivery:
    """Save the delivery to the previous store in a separate file; return the delivery to the new store."""
    delivery.write(_state_of(delivery.store, state))
    return Delivery.read(_state_of(store, state), journal)


def deliveries(state: Path, journal: Path) -> list[tuple[str, Pending]]:
    """Return each store that the tracker has used, with the amount of data that the store has not received.

    Stores without an address are left out. The current store comes first.
    """
    known: dict[str, Pending] = {}
    for file in (state, *sorted(state.parent.glob(f"{state.stem}@*.json"))):
        if (store := Delivery.read(file, journal).store) and store not in known:
            known[store] = count_pending(journal, file)
    return list(known.items())


def count_pending(journal: Path, state: Path) -> Pending:
    """Count the data that a tracker has not received according to the files of the run folder."""
    delivery = Delivery.read(state, journal)
    aside = (next(read_journal(journal, start)) for start in delivery.aside)
    refused = (lines_between(journal, start, end) for start, end in delivery.refused)
    lines = files = 0
    for line in chain(read_journal(journal, delivery.position), aside, *refused):
        if isinstance(line, Entry):
            files += line.kind == "artifact"
            lines += line.kind != "artifact"
    return Pending(lines=lines, files=files)


def lines_between(journal: Path, start: int, end: int) -> Iterator[Entry | Damage]:
    """Yield the lines of a journal between two byte positions."""
    return takewhile(lambda line: line.end <= end, read_journal(journal, start))


def _state_of(store: str, state: Path) -> Path:
    digest = hashlib.sha256(store.encode()).hexdigest()[:8]
    return state.with_name(f"{state.stem}@{digest}.json")
