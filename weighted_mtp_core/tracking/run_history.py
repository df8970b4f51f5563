"""Read the journal of a run, or some kinds of its lines, into one object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from attrs import define, field

from weighted_mtp_core.api import DatasetVersion, RunInfo
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.tracking.journal import Damage, Entry, read_journal
from weighted_mtp_core.tracking.run_folder import RunFolder


class Point(NamedTuple):
    """One value of a metric, which may be NaN or infinite."""

    step: int
    value: float
    time_ms: int


@define(kw_only=True, eq=False)
class RunHistory:
    """The contents of a run's journal, or of some of its lines; `add` adds a line.

    Attributes:
        run: `run_id`, `name` and `experiment` of the run; empty if no line about them was added.
        params: The resolved recipe with dotted keys, and params that depend on the data, such as
            `data.version`.
        tags: The tags of the run.
        datasets: The data that the run uses, from the last line of the journal about datasets.
        metrics: The points of each metric in the order of the journal, keyed by stage and metric.
        timings: The points of each measurement of time or memory in the order of the journal, keyed by name.
        last_step: The last step of each metric and of each measurement of time or memory.
        status: How the run ended; None if the run is still running, its process died, or the line about the
            end was not added.
        began_ms: Time of the first line, in milliseconds since 1970; 0 if there is no line.
        ended_ms: Time of the last line, in milliseconds since 1970; 0 if there is no line.
        damaged: Number of damaged lines.
    """

    run: dict[str, str] = field(factory=dict)
    params: dict[str, str] = field(factory=dict)
    tags: dict[str, str] = field(factory=dict)
    datasets: tuple[DatasetVersion, ...] = ()
    metrics: dict[str, dict[str, list[Point]]] = field(factory=dict)
    timings: dict[str, list[Point]] = field(factory=dict)
    last_step: dict[str, int] = field(factory=dict)
    status: str | None = None
    began_ms: int = 0
    ended_ms: int = 0
    damaged: int = 0

    def add(self, line: Entry | Damage) -> None:
        """Add the next line of the journal."""
        if isinstance(line, Damage):
            self.damaged += 1
            return
        self.began_ms = self.began_ms or line.time_ms
        self.ended_ms = line.time_ms
        fields = line.fields
        match line.kind:
            case "run":
                self.run.update(fields)
            case "params":
                self.params.update(fields["params"])
            case "tags":
                self.tags.update(fields["tags"])
            case "datasets":
                self.datasets = tuple(DatasetVersion(**each) for each in fields["datasets"])
            case "metrics" | "timings":
                self._add_points(line)
        if line.kind == "status":
            self.status = fields["status"]
        elif line.kind in {"run", "params", "tags", "metrics"}:
            self.status = None  # the run was resumed after it had ended

    def _add_points(self, line: Entry) -> None:
        step, values = line.fields["step"], line.fields["metrics"]
        self.last_step.update(dict.fromkeys(values, step))
        series = self.metrics.setdefault(line.fields["stage"], {}) if line.kind == "metrics" else self.timings
        for name, value in values.items():
            series.setdefault(name, []).append(Point(step, float(value), line.time_ms))

    def info(self, folder: Path) -> RunInfo:
        """Return the description of the run that trackers receive."""
        return RunInfo(
            run_id=self.run["run_id"],
            name=self.run["name"],
            experiment=self.run["experiment"],
            params=dict(self.params),
            tags=dict(self.tags),
            datasets=self.datasets,
            folder=folder,
            started_ms=self.began_ms,
        )

    def points(self, stage: str, metric: str) -> Sequence[Point]:
        """Return the points of a metric; empty if the metric was not recorded."""
        return self.metrics.get(stage, {}).get(metric, [])

    def last(self, stage: str, metric: str) -> float | None:
        """Return the last value of a metric, or None if the metric was not recorded."""
        points = self.points(stage, metric)
        return points[-1].value if points else None

    def numbered(self, stage: str, prefix: str) -> list[tuple[int, Sequence[Point]]]:
        """Return (number, points) for each metric with a name `<prefix><number>`, ordered by number."""
        metrics = self.metrics.get(stage, {})
        named = ((name.removeprefix(prefix), name) for name in metrics if name.startswith(prefix))
        return sorted((int(number), metrics[name]) for number, name in named if number.isdecimal())


def read_history(run: Path, *, kinds: Sequence[str] = ()) -> RunHistory:
    """Read the journal of a run folder; with `kinds`, read only lines of these kinds.

    Raises:
        WmtpError: The folder has no journal, or the journal has no line with the name of the run, unless
            `kinds` leaves out such lines.
    """
    journal = RunFolder(path=run).journal
    if not journal.is_file():
        raise WmtpError(f"`{run}` has no `{journal.name}`", hint="name the folder of a run")
    history = RunHistory()
    for line in read_journal(journal, kinds=kinds):
        history.add(line)
    if not history.run and (not kinds or "run" in kinds):
        raise WmtpError(f"the journal `{journal}` does not name its run")
    return history
