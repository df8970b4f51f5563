"""How much of a run's journal a store has received, kept in `delivery/<tracker>.json` of the run folder.

A delivery belongs to one store and to one run in it. Deliveries to other stores, which the tracker led to
before, are kept beside it.
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
    """How much a tracker has not received, and why (empty if nothing failed)."""

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
    """How far the upload to one store is.

    Attributes:
        store: The address of the store, without secrets; empty if the tracker does not tell.
        run: The id of the run in the store; empty if the tracker does not tell.
        position: Byte at which the next line to send begins.
        aside: Bytes at which earlier lines begin that are to be sent again.
        refused: Byte ranges of lines that the tracker will never accept.
    """

    store: str = ""
    run: str = ""
    position: int = 0
    aside: list[int] = field(factory=list)
    refused: list[tuple[int, int]] = field(factory=list)

    @classmethod
    def read(cls, state: Path, journal: Path) -> Delivery:
        """Read the file `state`; without one, nothing is delivered."""
        if not state.is_file():
            return cls()
        found = cls(**json.loads(state.read_text(encoding="utf-8")))
        # the end of the journal may be gone: a full disk, or a line cut off after a kill
        found.position = min(found.position, journal.stat().st_size)
        found.aside = [start for start in found.aside if start < found.position]
        found.refused = [(start, end) for start, end in found.refused if end <= found.position]
        return found

    def write(self, state: Path) -> None:
        """Write the file `state`."""
        state.parent.mkdir(exist_ok=True)
        atomic_write(state, json.dumps(asdict(self)) + "\n")

    def lost_by(self, kept: KeptRun, journal: Path) -> str:
        """Return what a store no longer has of what it received; empty if it has all of it.

        A run may have been deleted, and a database restored from an older copy.
        """
        if not self.position:
            return ""
        if self.run and kept.run != self.run:
            return f"has no run `{self.run}` any more"
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
    """Keep the delivery to one store aside, and return that to another one."""
    delivery.write(_state_of(delivery.store, state))
    return Delivery.read(_state_of(store, state), journal)


def deliveries(state: Path, journal: Path) -> list[tuple[str, Pending]]:
    """Return every store that the tracker led to, the present one first, and what each lacks."""
    known: dict[str, Pending] = {}
    for file in (state, *sorted(state.parent.glob(f"{state.stem}@*.json"))):
        if (store := Delivery.read(file, journal).store) and store not in known:
            known[store] = count_pending(journal, file)
    return list(known.items())


def count_pending(journal: Path, state: Path) -> Pending:
    """Count what a tracker has not received, from the files alone."""
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
    """Yield the lines in a range of bytes."""
    return takewhile(lambda line: line.end <= end, read_journal(journal, start))


def _state_of(store: str, state: Path) -> Path:
    digest = hashlib.sha256(store.encode()).hexdigest()[:8]
    return state.with_name(f"{state.stem}@{digest}.json")
