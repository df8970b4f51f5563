"""What the stages tell a run: metrics, timings, tags, files and words; written to the run folder, then sent.

    with open_recorder(plan, display) as record:
        record.metrics("policy", 10, {"policy_loss": 1.25})

Leaving the block closes the run: FINISHED, or FAILED after an exception, or KILLED after a signal.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from attrs import asdict, define, field

from weighted_mtp_core.api import DatasetVersion, RunInfo, RunOutcome, Tracker
from weighted_mtp_core.errors import RunFailedError, Terminated
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.redaction import redact, redact_log_records
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.tracking.backfill import Backfill
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.tracking.journal import Damage, Journal, now_ms, plain_number, read_journal
from weighted_mtp_core.tracking.names import check_metric_name, check_path_name
from weighted_mtp_core.tracking.retrying_uploader import RetryingUploader
from weighted_mtp_core.tracking.run_folder import RunFolder, read_run
from weighted_mtp_core.tracking.run_log import RunLog
from weighted_mtp_core.tracking.trackers import build_trackers

_SWITCH_S = 0.0005
"""How long a delivery keeps the interpreter from the thread that trains; Python's own 5 ms would be felt."""


@define(kw_only=True, eq=False)
class Recorder:
    """One run being recorded. The thread that trains never waits for a tracker.

    Attributes:
        folder: The run folder, locked.
        display: What a person sees.
    """

    folder: RunFolder
    display: Display
    _journal: Journal
    _log: RunLog
    _trackers: Mapping[str, Tracker]
    _close_seconds: float
    _deliveries: list[RetryingUploader] = field(init=False, factory=list)
    _last_step: dict[str, int] = field(init=False, factory=dict)
    _recorded_before: dict[str, int] = field(init=False, factory=dict)
    _lost_finite: set[str] = field(init=False, factory=set)
    _earlier: Backfill | None = field(init=False, default=None)
    _closed: bool = field(init=False, default=False)
    _restore_signal: Any = field(init=False, default=None)
    _switch_interval: float = field(init=False, factory=sys.getswitchinterval)

    @classmethod
    def open(
        cls,
        folder: RunFolder,
        info: RunInfo,
        *,
        trackers: Mapping[str, Tracker],
        recipe_toml: str,
        display: Display,
        close_seconds: float = 30.0,
    ) -> Recorder:
        """Begin a run, or go on with one: write down what it is, then open it at every tracker.

        Args:
            folder: The run folder.
            info: What the run is.
            trackers: Where it goes too, by the names of `build_trackers`.
            recipe_toml: The resolved recipe.
            display: What a person sees.
            close_seconds: How long the end of the run waits for trackers that take nothing any more.

        Raises:
            WmtpError: A tracker will never take this run; it is closed as FAILED everywhere else.
        """
        atomic_write(folder.recipe, recipe_toml)
        recorder = cls(
            folder=folder,
            display=display,
            journal=Journal(folder.journal),
            log=RunLog.open(folder.log),
            trackers=trackers,
            close_seconds=close_seconds,
        )
        folder.record(
            run_id=info.run_id,
            name=info.name,
            experiment=info.experiment,
            status="RUNNING",
            started_ms=read_run(folder.path).get("started_ms", info.started_ms),
            trackers=list(trackers),
        )
        recorder._describe_or_go_on(info)
        try:
            recorder._start_deliveries()
        except BaseException as error:
            recorder._end(error)
            raise
        return recorder

    def _describe_or_go_on(self, info: RunInfo) -> None:
        """Describe a new run; of an old one, find out what it has recorded already."""
        described = False
        for entry in read_journal(self.folder.journal, kinds=("run", "metrics", "timings")):
            if isinstance(entry, Damage):
                self.log(f"WARNING: a damaged line in `{self.folder.journal}` is left out")
            elif entry.kind == "run":
                described = True
            else:
                for name in entry.fields["metrics"]:
                    self._recorded_before[name] = entry.fields["step"]
        if described:
            self.tags({"wmtp.resumed": "true"})
        else:
            self._describe(info)

    def _describe(self, info: RunInfo) -> None:
        run = {"run_id": info.run_id, "name": info.name, "experiment": info.experiment}
        self._journal.append("run", run)
        self._journal.append("params", {"params": _without_secrets(info.params)})
        self._journal.append("tags", {"tags": _without_secrets(info.tags)})
        if info.datasets:
            self.datasets(info.datasets)
        self.artifact(self.folder.recipe, "")

    def _start_deliveries(self) -> None:
        if self._trackers:
            sys.setswitchinterval(_SWITCH_S)
        for name, tracker in self._trackers.items():
            delivery = RetryingUploader.to(tracker, name, self.folder, log=self.log)
            delivery.start()
            self._deliveries.append(delivery)

    # ------------------------------------------------------------------- what the stages call

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Record scalars that are the same in every run of a recipe.

        What a run recorded before it was resumed is not recorded again.

        Raises:
            RunFailedError: A metric comes a second time for its step, or for an earlier one.
        """
        self._record("metrics", stage, step, values)

    def timings(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Record wall-clock measurements, which differ from run to run."""
        self._record("timings", stage, step, values)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Move the display."""
        self.display.update(step, values)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run."""
        self._journal.append("tags", {"tags": _without_secrets(tags)})

    def datasets(self, versions: Sequence[DatasetVersion]) -> None:
        """Record the data that the run uses, as dataset inputs and as params (`data.version`, ...)."""
        self._journal.append("datasets", {"datasets": [asdict(version) for version in versions]})
        params: dict[str, str] = {}
        for number, version in enumerate(versions):
            prefix = "data" if number == 0 else f"data.{number}"
            params |= {f"{prefix}.{key}": value for key, value in asdict(version).items()}
        self._journal.append("params", {"params": params})

    def artifact(self, path: Path, subdir: str) -> None:
        """Store a file of the run folder at every tracker, as it is when its turn comes."""
        if subdir:
            check_path_name(subdir, what="an artifact folder")
        check_path_name(path.name, what="an artifact")
        relative = path.absolute().relative_to(self.folder.path)
        self._journal.append("artifact", {"path": relative.as_posix(), "subdir": subdir})

    def report(self, rows: Sequence[tuple[str, str]]) -> None:
        """Store what came out, as names and values, in `report.md`."""
        path = self.folder.path / "report.md"
        atomic_write(path, "".join(f"- **{name}**: {redact(value)}\n" for name, value in rows))
        self.artifact(path, "")

    def log(self, text: str) -> None:
        """Tell the person and the log."""
        text = redact(text)
        self._log.write(text)
        self.display.note(text)

    def where(self) -> list[str]:
        """Return a line for each tracker that says how to look at the run there."""
        return [redact(line) for tracker in self._trackers.values() if (line := tracker.where())]

    def _record(self, kind: str, stage: str, step: int, values: Mapping[str, float]) -> None:
        # The thread that trains comes here at every step: no loop over names unless something is new.
        self._check_order(stage, step, values)
        numbers: dict[str, float | str] = dict(zip(values, map(float, values.values()), strict=True))
        if self._recorded_before:
            before = self._recorded_before
            numbers = {name: value for name, value in numbers.items() if step > before.get(name, -1)}
        if not math.isfinite(sum(map(float, numbers.values()))):
            numbers = self._as_plain_numbers(step, numbers)
        if numbers:
            self._journal.append(kind, {"step": step, "stage": stage, "metrics": numbers})

    def _check_order(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        last = self._last_step
        if not (last.keys() >= values.keys() and max(map(last.__getitem__, values), default=-1) < step):
            for name in values:
                if name not in last:
                    check_metric_name(name)
                elif step <= last[name]:
                    raise RunFailedError(
                        f"metric `{name}` was recorded for step {step} of stage `{stage}` "
                        f"after step {last[name]}"
                    )
        last.update(dict.fromkeys(values, step))

    def _as_plain_numbers(self, step: int, numbers: Mapping[str, float | str]) -> dict[str, float | str]:
        plain = {name: plain_number(float(value)) for name, value in numbers.items()}
        for name, value in plain.items():
            if isinstance(value, str) and name not in self._lost_finite:
                self._lost_finite.add(name)
                self.log(f"`{name}` is {value} at step {step}; such values stay in the run folder")
        return plain

    def send_earlier(self, experiment: Path) -> None:
        """Send, in the background, what trackers of earlier runs in the experiment's folder did not get."""
        self._earlier = Backfill(experiment, self.folder.path, self.log)

    # ------------------------------------------------------------------- the end

    def finish(self, outcome: RunOutcome, *, error_class: str | None = None) -> None:
        """Close the run everywhere; a second call does nothing.

        Args:
            outcome: How it ended.
            error_class: The class of the exception that ended it; becomes the tag `wmtp.error_class`.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if error_class is not None:
                self.tags({"wmtp.error_class": error_class})
            self._log.write(f"run {outcome.value}")
            self.artifact(self.folder.log, "logs")
            self._journal.append("status", {"status": outcome.value})
            self.folder.record(status=outcome.value, ended_ms=now_ms())
            began = time.monotonic()
            self._close_deliveries()
            if self._earlier is not None:
                self._earlier.wait(max(0.0, began + self._close_seconds - time.monotonic()))
        finally:
            sys.setswitchinterval(self._switch_interval)
            self._journal.close()
            self._log.close()
            self.folder.close()

    def _end(self, error: BaseException | None) -> None:
        outcome, error_class = _outcome(error)
        if error is not None and outcome is not RunOutcome.FINISHED and not self._closed:
            self._log.write_failure(error)
        self.finish(outcome, error_class=error_class)

    def _close_deliveries(self) -> None:
        for delivery in self._deliveries:
            delivery.flush()
        for delivery in self._deliveries:
            pending = delivery.close(self._close_seconds)
            if pending:
                self.log(
                    f"`{delivery.name}` did not get {pending}"
                    + (f" ({pending.reason})" if pending.reason else "")
                    + f"; it is kept: python -m weighted_mtp_core track sync {self.folder.path}"
                )

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._restore_signal = signal.signal(signal.SIGTERM, _raise_terminated)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._end(error)
        finally:
            if self._restore_signal is not None:
                signal.signal(signal.SIGTERM, self._restore_signal)


def open_recorder(plan: Plan, display: Display, *, resume: Path | None = None) -> Recorder:
    """Make the run folder of a plan, build its trackers and begin the run; or go on with an old folder.

    Raises:
        WmtpError: The folder cannot be made or is in use, or a tracker will never take this run.
    """
    redact_log_records()
    recipe = plan.recipe
    trackers = build_trackers(plan)
    if resume is None:
        folder = RunFolder.create(plan.runs_folder, experiment=plan.experiment, name=recipe.run.name)
    else:
        folder = RunFolder.open(resume)
    info = RunInfo(
        run_id=folder.run_id,
        name=recipe.run.name,
        experiment=plan.experiment,
        params=plan.params,
        tags=plan.tags,
        datasets=(),
        folder=folder.path,
    )
    recorder = Recorder.open(
        folder,
        info,
        trackers=trackers,
        recipe_toml=plan.recipe_toml,
        display=display,
        close_seconds=max((table.close_seconds for table in recipe.tracker), default=0.0),
    )
    recorder.send_earlier(plan.runs_folder / plan.experiment)
    return recorder


def _outcome(error: BaseException | None) -> tuple[RunOutcome, str | None]:
    """Return how a run ended that this exception left; `sys.exit(0)` is a regular end."""
    if error is None or (isinstance(error, SystemExit) and error.code in {None, 0}):
        return RunOutcome.FINISHED, None
    if isinstance(error, KeyboardInterrupt):
        return RunOutcome.KILLED, None
    return RunOutcome.FAILED, type(error).__name__


def _raise_terminated(number: int, frame: object) -> None:
    del number, frame
    raise Terminated


def _without_secrets(values: Mapping[str, str]) -> dict[str, str]:
    return {key: redact(str(value)) for key, value in values.items()}
