"""Record a run: write metrics, timings, tags, files and messages to its folder, and send them to trackers.

    with open_recorder(plan, display) as record:
        record.metrics("policy", 10, {"policy_loss": 1.25})

`open_recorder` is in `opening.py`. The end of the `with` block closes the run: as KILLED after a signal,
FAILED after an error, else FINISHED.
"""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from attrs import asdict, define, field

from weighted_mtp_core import run_tags
from weighted_mtp_core.api import DatasetVersion, RunInfo, RunOutcome, Tracker
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.messages import python_command
from weighted_mtp_core.redaction import redact
from weighted_mtp_core.runtime.interrupts import hold_signals, raise_on_termination
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.tracking.backfill import start_backfill
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.tracking.journal import Damage, Journal, now_ms, plain_number, read_journal
from weighted_mtp_core.tracking.names import check_metric_name, check_path_name
from weighted_mtp_core.tracking.retrying_uploader import RetryingUploader
from weighted_mtp_core.tracking.run_folder import RunFolder, read_run
from weighted_mtp_core.tracking.run_history import RunHistory
from weighted_mtp_core.tracking.run_log import RunLog

_REPLAYED = ("run", "params", "tags", "metrics", "timings")
_OF_DATA = re.compile(r"data\.(\d+\.)?(name|version|sha256)|(critic\.)?train\.steps")
"""Params that depend on the data; `datasets` and `params` add them after the start of the run."""
_SWITCH_S = 0.0005
"""Seconds for which an upload thread may block the training thread; Python's default of 5 ms is too long."""


@define(kw_only=True, eq=False)
class Recorder:
    """Records one run. During training, the training thread never waits for a tracker.

    Attributes:
        folder: The run folder, which this process has locked.
        display: Shows the progress of the run to the user.
    """

    folder: RunFolder
    display: Display
    _journal: Journal
    _log: RunLog
    _trackers: Mapping[str, Tracker]
    _close_seconds: float
    _uploaders: list[RetryingUploader] = field(init=False, factory=list)
    _last_step: dict[str, int] = field(init=False, factory=dict)
    _recorded_before: Mapping[str, int] = field(init=False, factory=dict)
    _params_before: Mapping[str, str] = field(init=False, factory=dict)
    _non_finite: set[str] = field(init=False, factory=set)
    _backfill: threading.Thread | None = field(init=False, default=None)
    _closed: bool = field(init=False, default=False)
    _held: ExitStack = field(init=False, factory=ExitStack)
    _signals: ExitStack = field(init=False, factory=ExitStack)
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
        """Begin or resume a run: record the run's description, then open the run at every tracker.

        Args:
            folder: The run folder.
            info: Description of the run.
            trackers: Trackers, keyed by the names from `build_trackers`.
            recipe_toml: The resolved recipe.
            display: Shows the progress of the run to the user.
            close_seconds: Seconds without a successful upload after which the run, at its end, stops waiting
                for a tracker.

        Raises:
            WmtpError: A tracker permanently refuses this run, which is then closed as FAILED at the trackers
                that had accepted it.
            RunFailedError: The journal is not writable.
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
        try:
            folder.record(
                run_id=info.run_id,
                name=info.name,
                experiment=info.experiment,
                status="RUNNING",
                started_ms=read_run(folder.path).get("started_ms", info.started_ms),
                trackers=list(trackers),
            )
            recorder._describe_or_resume(info)
            recorder._start_uploads()
        except BaseException as error:
            recorder.finish(_outcome(error), error=error)
            raise
        return recorder

    def _describe_or_resume(self, info: RunInfo) -> None:
        """Record the description of a new run, or the changes of a resumed run after reading its journal."""
        history = RunHistory()
        for line in read_journal(self.folder.journal, kinds=_REPLAYED):
            history.add(line)
            if isinstance(line, Damage):
                self.log(f"WARNING: a damaged line in `{self.folder.journal}` is left out")
        self._recorded_before, self._params_before = history.last_step, history.params
        if history.run:
            self._describe_changes(history, info)
            return
        run = {"run_id": info.run_id, "name": info.name, "experiment": info.experiment}
        self._journal.append("run", run)
        self._journal.append("params", {"params": _without_secrets(info.params)})
        self._journal.append("tags", {"tags": _without_secrets(info.tags)})
        if info.datasets:
            self.datasets(info.datasets)
        self.artifact(self.folder.recipe, "")

    def _describe_changes(self, history: RunHistory, info: RunInfo) -> None:
        """Record changed params of a resumed run also as tags, because MLflow cannot change a param."""
        params, tags = _without_secrets(info.params), _without_secrets(info.tags)
        changed = {key: value for key, value in params.items() if history.params.get(key) != value}
        gone = history.params.keys() - params.keys()
        changed |= dict.fromkeys((key for key in gone if not _OF_DATA.fullmatch(key)), "absent")
        if changed:
            self._journal.append("params", {"params": changed})
            self.artifact(self.folder.recipe, "")
        tags |= {f"{run_tags.CHANGED_PREFIX}{key}": value for key, value in changed.items()}
        self.tags(
            {key: value for key, value in tags.items() if history.tags.get(key) != value}
            | {run_tags.RESUMED: "true"}
        )

    def _start_uploads(self) -> None:
        if self._trackers:
            sys.setswitchinterval(_SWITCH_S)
        for name, tracker in self._trackers.items():
            uploader = RetryingUploader.to(tracker, name, self.folder, log=self.log)
            uploader.start()
            self._uploaders.append(uploader)

    def start_backfill(self, experiment: Path) -> None:
        """In the background, send what trackers have not received from earlier runs of the experiment."""
        self._backfill = start_backfill(experiment, skip=self.folder.path, log=self.log)

    # ------------------------------------------------------------------- during the run

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Record scalars that a repetition of the run reproduces, unlike the measurements of `timings`.

        A resumed run does not record again the steps that it recorded before the interruption.

        Raises:
            RunFailedError: A metric was recorded for this or a later step, or the journal is not writable.
            WmtpError: The name of a metric is not valid.
        """
        self._record("metrics", stage, step, values)

    def timings(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Record measurements of time or memory, which differ from run to run.

        Raises the same errors as `metrics`.
        """
        self._record("timings", stage, step, values)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Show that `step` steps of the current stage are done, with the given values."""
        self.display.update(step, values)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; the module `run_tags` defines the keys of the framework's own tags."""
        self._journal.append("tags", {"tags": _without_secrets(tags)})

    def params(self, params: Mapping[str, str]) -> None:
        """Record params that depend on the data; if a resumed run changes them, record them also as tags."""
        self._journal.append("params", {"params": params})
        before = {key: self._params_before.get(key, value) for key, value in params.items()}
        changed = {key: value for key, value in params.items() if before[key] != value}
        if changed:
            self.tags({f"{run_tags.CHANGED_PREFIX}{key}": value for key, value in changed.items()})

    def datasets(self, versions: Sequence[DatasetVersion]) -> None:
        """Record the data that the run uses, as datasets and as params such as `data.version`."""
        self._journal.append("datasets", {"datasets": [asdict(version) for version in versions]})
        params: dict[str, str] = {}
        for number, version in enumerate(versions):
            prefix = "data" if number == 0 else f"data.{number}"
            params |= {f"{prefix}.{key}": value for key, value in asdict(version).items()}
        self._journal.append("params", {"params": params})

    def artifact(self, path: Path, subdir: str) -> None:
        """Schedule the upload of a file of the run folder to every tracker.

        Trackers receive the contents that the file has at the time of the upload.

        Args:
            path: The file.
            subdir: The folder of the run's artifacts that gets the file; empty for the top folder.

        Raises:
            WmtpError: `subdir` or the name of the file is not valid for an artifact.
            RunFailedError: The journal is not writable.
        """
        if subdir:
            check_path_name(subdir, what="an artifact folder")
        check_path_name(path.name, what="an artifact")
        relative = path.absolute().relative_to(self.folder.path)
        self._journal.append("artifact", {"path": relative.as_posix(), "subdir": subdir})

    def report(self, rows: Sequence[tuple[str, str]]) -> None:
        """Write results, given as pairs (name, value), to `report.md` in the run folder, and upload it."""
        path = self.folder.path / "report.md"
        atomic_write(path, "".join(f"- **{name}**: {redact(value)}\n" for name, value in rows))
        self.artifact(path, "")

    def log(self, text: str) -> None:
        """Write a line to the display and to the log of the run, without secrets."""
        text = redact(text)
        self._log.write(text)
        self.display.note(text)

    def where(self) -> list[str]:
        """Return lines that tell the user where to find the run: one line of each tracker that has one."""
        return [redact(line) for tracker in self._trackers.values() if (line := tracker.where())]

    def _record(self, kind: str, stage: str, step: int, values: Mapping[str, float]) -> None:
        # called at every step by the training thread, so names are only looped over if a name is new
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
            if isinstance(value, str) and name not in self._non_finite:
                self._non_finite.add(name)
                self.log(f"`{name}` is {value} at step {step}; such values stay in the run folder")
        return plain

    # ------------------------------------------------------------------- the end

    def finish(self, outcome: RunOutcome, *, error: BaseException | None = None) -> None:
        """Close the run at all trackers and in the run folder; a second call does nothing.

        Args:
            outcome: How the run ended.
            error: The exception that ended the run, or None. Unless the outcome is `FINISHED`, the traceback
                of `error` is logged. If the outcome is `FAILED`, the class of `error` becomes the tag
                `wmtp.error_class`.
        """
        if self._closed:
            return
        with ExitStack() as closing:
            with hold_signals():
                self._closed = True
                for close in (self.folder.close, self._log.close, self._journal.close):
                    closing.callback(close)
                closing.callback(sys.setswitchinterval, self._switch_interval)
                if error is not None and outcome is not RunOutcome.FINISHED:
                    self._log.write_failure(error)
                if error is not None and outcome is RunOutcome.FAILED:
                    self.tags({run_tags.ERROR_CLASS: type(error).__name__})
                self._log.write(f"run {outcome.value}")
                self.artifact(self.folder.log, "logs")
                self._journal.append("status", {"status": outcome.value})
                # called after the upload, so that `run.resume = "auto"` continues a run killed during it
                closing.callback(self._record_end, status=outcome.value, ended_ms=now_ms())
            self._send_the_rest()

    def _record_end(self, **facts: Any) -> None:
        with hold_signals():
            self.folder.record(**facts)

    def _send_the_rest(self) -> None:
        began = time.monotonic()
        for uploader in self._uploaders:
            uploader.flush()
        for uploader in self._uploaders:
            pending = uploader.close(self._close_seconds)
            if pending:
                self.log(
                    f"`{uploader.name}` has not received {pending}"
                    + (f" ({pending.reason})" if pending.reason else "")
                    + "; it is kept: "
                    + python_command("weighted_mtp_core", "track", "sync", str(self.folder.path))
                )
        if self._backfill is not None:
            self._backfill.join(max(0.0, began + self._close_seconds - time.monotonic()))

    def hold_until_entered(self, held: ExitStack) -> None:
        """Delay signals until the recorder's `with` block begins, because only this block can close the run.

        Args:
            held: A stack that contains `hold_signals`; the recorder closes this stack.
        """
        self._held = held

    def __enter__(self) -> Self:
        try:
            self._held.close()
            self._signals.enter_context(raise_on_termination())
        except KeyboardInterrupt as error:
            self.finish(_outcome(error), error=error)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._signals:
            self.finish(_outcome(error), error=error)


def _outcome(error: BaseException | None) -> RunOutcome:
    if error is None or (isinstance(error, SystemExit) and error.code in {None, 0}):
        return RunOutcome.FINISHED
    return RunOutcome.KILLED if isinstance(error, KeyboardInterrupt) else RunOutcome.FAILED


def _without_secrets(values: Mapping[str, str]) -> dict[str, str]:
    return {key: redact(str(value)) for key, value in values.items()}
