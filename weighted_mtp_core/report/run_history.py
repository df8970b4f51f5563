"""What the journal of a run tells, put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import define, field

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.tracking.journal import Damage, Entry, read_journal
from weighted_mtp_core.tracking.run_folder import RunFolder


@define(kw_only=True, eq=False)
class RunHistory:
    """A run as its journal tells it.

    Attributes:
        run: Id, name and experiment.
        params: The resolved recipe with dotted keys, and the data's name, version and checksum.
        tags: Plugins, addresses, versions.
        curves: By stage and metric, the points (step, value) in order; a value may be NaN or infinite.
        timings: By stage and measurement, the same.
        status: How it ended; None while it runs, or if it died.
        began_ms: The first line's time, in milliseconds since 1970.
        ended_ms: The last line's.
        damaged: How many lines could not be read.
    """

    run: dict[str, str] = field(factory=dict)
    params: dict[str, str] = field(factory=dict)
    tags: dict[str, str] = field(factory=dict)
    curves: dict[str, dict[str, list[tuple[int, float]]]] = field(factory=dict)
    timings: dict[str, dict[str, list[tuple[int, float]]]] = field(factory=dict)
    status: str | None = None
    began_ms: int = 0
    ended_ms: int = 0
    damaged: int = 0

    def points(self, stage: str, metric: str) -> list[tuple[int, float]]:
        """Return a metric's points; none if it was not recorded."""
        return self.curves.get(stage, {}).get(metric, [])

    def last(self, stage: str, metric: str) -> float | None:
        """Return a metric's last value."""
        points = self.points(stage, metric)
        return points[-1][1] if points else None

    def numbered(self, stage: str, prefix: str) -> list[tuple[int, list[tuple[int, float]]]]:
        """Return the metrics `<prefix><number>` with their numbers, in order."""
        metrics = self.curves.get(stage, {})
        named = ((name.removeprefix(prefix), name) for name in metrics if name.startswith(prefix))
        return sorted((int(number), metrics[name]) for number, name in named if number.isdecimal())


def read_history(run: Path) -> RunHistory:
    """Read a run folder's journal.

    Raises:
        WmtpError: There is none, or it does not begin with a run.
    """
    path = RunFolder(path=run).journal
    if not path.is_file():
        raise WmtpError(f"`{run}` has no `{path.name}`", hint="name the folder of a run")
    story = RunHistory()
    for entry in _whole(path, story):
        if not story.began_ms:
            story.began_ms = entry.time_ms
        story.ended_ms = entry.time_ms
        _add(story, entry.kind, entry.fields)
    if not story.run:
        raise WmtpError(f"the journal `{path}` does not say which run it is of")
    return story


def _whole(path: Path, story: RunHistory) -> Iterator[Entry]:
    for entry in read_journal(path):
        if isinstance(entry, Damage):
            story.damaged += 1
        else:
            yield entry


def _add(story: RunHistory, kind: str, fields: Mapping[str, Any]) -> None:
    if kind == "run":
        story.run.update(fields)
    elif kind == "params":
        story.params.update(fields["params"])
    elif kind == "tags":
        story.tags.update(fields["tags"])
    elif kind == "status":
        story.status = fields["status"]
    elif kind in {"metrics", "timings"}:
        kept = story.curves if kind == "metrics" else story.timings
        stage = kept.setdefault(fields["stage"], {})
        for name, value in fields["metrics"].items():
            stage.setdefault(name, []).append((fields["step"], float(value)))
    if kind in {"run", "params", "tags", "metrics"}:
        story.status = None  # a resumed run goes on after an end
