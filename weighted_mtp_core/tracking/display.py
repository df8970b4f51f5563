"""Shows the progress of a run: a progress bar on a terminal, otherwise one line every few seconds."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from attrs import define, field
from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from weighted_mtp_core.api import Batch

PLAIN_EVERY_S = 5.0
"""Minimum seconds between two lines of progress if the output is not a terminal but, for example, a file."""

_BARS = "▁▂▃▄▅▆▇█"
_CURVE = 32
_INDENT = " " * 11
_FRAME = 6  # characters that a panel adds to the width of its two columns


def sparkline(values: Sequence[float]) -> str:
    """Return the finite values as a row of bars, scaled from minimum to maximum; empty if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    return "".join(_BARS[round((len(_BARS) - 1) * (value - low) / span)] if span else "▄" for value in finite)


def show(value: float | str) -> str:
    """Return a number as text, with up to four significant digits or as an integer such as `12,346`.

    Numbers with an absolute value of 1000 or more are shown as integers. A value that is already text is
    returned unchanged.
    """
    if isinstance(value, str):
        return value
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return a number of seconds as text, such as `12 s`, `3:05` or `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


@define(eq=False)
class _Stage:
    """The progress of the current stage."""

    name: str
    total: int
    task: TaskID
    began: float = field(factory=time.monotonic)
    step: int = 0
    values: dict[str, float | str] = field(factory=dict)
    curve: deque[float] = field(factory=lambda: deque(maxlen=_CURVE))

    def facts(self) -> str:
        return "  ".join(f"{name} {show(value)}" for name, value in self.values.items())

    def remaining(self) -> str:
        spent = time.monotonic() - self.began
        return duration(spent / self.step * (self.total - self.step)) if self.step else "?"


def _panel(rows: Sequence[tuple[str, str]], *, title: str) -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return Panel(table, title=title, title_align="left", expand=False)


class _Console(Console):
    """A console that stops writing if the reader of its output ends, so that the run continues."""

    def on_broken_pipe(self) -> None:
        """Discard all further output; the method of the base class would end the process."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


@define(eq=False)
class Display:
    """Context manager that shows the progress of a run; with several processes, only rank 0 shows it.

    On a terminal, a block at the bottom is redrawn; for any other output, lines are written.
    """

    console: Console = field(factory=_Console)
    _live: Live | None = field(init=False, default=None)
    _progress: Progress = field(init=False)
    _stage: _Stage | None = field(init=False, default=None)
    _last_line: float = field(init=False, default=0.0)

    def __attrs_post_init__(self) -> None:
        if os.environ.get("RANK", "0") != "0":
            self.console = Console(quiet=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=self.console,
            auto_refresh=False,
        )

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(
                console=self.console, refresh_per_second=4, transient=True, get_renderable=self._draw
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_stage(done=error is None)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def stage(self, name: str, total: int) -> None:
        """End the previous stage, and begin a stage of `total` steps."""
        self._end_stage(done=True)
        self._stage = _Stage(name, total, self._progress.add_task(name, total=total))
        self._last_line = time.monotonic()
        if self._live is None:
            self.note(f"{name}: {total} steps")

    def update(self, step: int, values: Mapping[str, float | str]) -> None:
        """Show that `step` steps of the current stage are done, with named values.

        Without a stage, nothing is shown. On a terminal, the first value is also drawn as a curve if it is a
        number.
        """
        stage = self._stage
        if stage is None:
            return
        stage.step = step
        stage.values.update(values)
        head = next(iter(values.values()), None)
        if isinstance(head, float | int):
            stage.curve.append(head)
        self._progress.update(stage.task, completed=step)
        if self._live is None and time.monotonic() - self._last_line >= PLAIN_EVERY_S:
            self._last_line = time.monotonic()
            self.note(f"{stage.name} {step}/{stage.total}  {stage.facts()}  {stage.remaining()} left")

    def counted(self, name: str, total: int, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches, and show as a stage how many of their `total` rows have been used."""
        self.stage(name, total)
        done = 0
        for batch in batches:
            yield batch
            done += len(batch.ids_BT)
            self.update(done, {})

    def note(self, text: str) -> None:
        """Write a line, on a terminal above the progress bar."""
        if self._live is not None:
            self._live.refresh()  # otherwise the old block is drawn below the line
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def summary(self, rows: Sequence[tuple[str, str]], *, title: str = "summary") -> None:
        """Show results, given as pairs (name, value), in a panel if they fit on a terminal, else as lines."""
        self._end_stage(done=True)
        if self._live is not None:
            self._live.stop()
            self._live = None
        width = max((cell_len(name) for name, _ in rows), default=0)
        longest = max((cell_len(value) for _, value in rows), default=0)
        if self.console.is_terminal and width + longest + _FRAME <= self.console.width:
            self.console.print(_panel(rows, title=title))
            return
        for name, value in rows:  # each row on one line, so that a path can be copied
            self.note(f"{name:<{width}}  {value}")

    def _end_stage(self, *, done: bool) -> None:
        stage, self._stage = self._stage, None
        if stage is None:
            return
        self._progress.remove_task(stage.task)
        mark = "done" if done else "stopped"
        spent = duration(time.monotonic() - stage.began)
        self.note(f"{stage.name} {mark}: {stage.step} steps in {spent}  {stage.facts()}".rstrip())

    def _draw(self) -> Group:
        stage = self._stage
        if stage is None:
            return Group()
        facts = Text(_INDENT + stage.facts(), style="dim", no_wrap=True, overflow="ellipsis")
        facts.append("  " + sparkline(stage.curve), style="cyan")
        return Group(self._progress, facts)
