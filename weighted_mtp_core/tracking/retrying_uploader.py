"""Upload a run's journal and files to one tracker in the background, and retry failed uploads with back-off.

The journal file is the queue, so an outage or a killed process loses no data, and memory use does not grow.
`outbox.py` stores the position in the journal and the lines that must be sent again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

from attrs import define, field

from weighted_mtp_core.api import Tracker
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.tracking.delivery import Pending
from weighted_mtp_core.tracking.outbox import Outbox, one_line
from weighted_mtp_core.tracking.run_folder import RunFolder

_PAUSE_S = 1.0  # between two batches, because a batch costs a tracker the same with 1 or 1000 metrics
_BACK_OFF_S = (0.5, 1.0, 2.0, 3.0)  # the last pause repeats, so a tracker's return is noticed soon


@define(kw_only=True, eq=False)
class RetryingUploader:
    """One background thread that sends the data of one outbox; training never waits for this thread.

    Attributes:
        name: The address of the tracker, used in messages.
        outbox: The data to upload.
        log: Called with messages for the user and for the log, also from the background thread.
    """

    name: str
    outbox: Outbox
    log: Callable[[str], None]
    _closing: threading.Event = field(init=False, factory=threading.Event)
    _abandoned: threading.Event = field(init=False, factory=threading.Event)
    _failures: int = field(init=False, default=0)
    _file_failures: int = field(init=False, default=0)
    _next_file_retry: float = field(init=False, default=0.0)
    _last_success: float = field(init=False, factory=time.monotonic)
    _flushed: float = field(init=False, default=0.0)
    _thread: threading.Thread | None = field(init=False, default=None)

    @classmethod
    def to(cls, tracker: Tracker, name: str, folder: RunFolder, *, log: Callable[[str], None]) -> Self:
        """Return an uploader from a run folder to a tracker; `name` has the form `<number>-<address>`."""
        outbox = Outbox(
            tracker=tracker, folder=folder.path, journal=folder.journal, state=folder.delivery(name)
        )
        return cls(name=name.partition("-")[2] or name, outbox=outbox, log=log)

    def start(self) -> None:
        """Open the run at the tracker, then start the background thread; an outage is only logged.

        Raises:
            WmtpError: The tracker permanently refuses this run.
        """
        try:
            self.outbox.open()
        except WmtpError:
            raise
        except Exception as error:  # noqa: BLE001 - by contract any exception means "not delivered"
            self._failed(error)
        self._thread = threading.Thread(target=self._run, name=f"uploader-{self.name}", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Declare that the journal is complete, so that the remaining data are sent without pauses."""
        self._flushed = self._flushed or time.monotonic()
        self._closing.set()

    def close(self, limit_s: float) -> Pending:
        """Wait until all data are sent, and return the amount of undelivered data.

        Args:
            limit_s: Stop waiting after this number of seconds without a successful upload; a large file that
                is being uploaded extends the limit.
        """
        self.flush()
        if self._thread is None:
            return self.outbox.pending()
        try:
            while self._thread.is_alive():
                self._thread.join(0.05)
                idle = time.monotonic() - max(self._flushed, self._last_success)
                if idle > limit_s + self.outbox.allowance_s():
                    break
        finally:
            self._abandoned.set()
        return self.outbox.pending()

    def _run(self) -> None:
        while not self._abandoned.is_set():
            closing = self._closing.is_set()
            try:
                sent = self.outbox.step()
                if not sent or not self.outbox.full:
                    self._retry_aside()
            except Exception as error:  # noqa: BLE001 - by contract any exception means "not delivered"
                self._failed(error)
                self._abandoned.wait(_back_off(self._failures))
                continue
            self._succeeded()
            if sent:
                self._last_success = time.monotonic()
            if sent and (closing or self.outbox.full):
                continue
            if closing and not self.outbox.waiting:
                return
            (self._abandoned if closing else self._closing).wait(_PAUSE_S)

    def _retry_aside(self) -> None:
        """Send again the lines that were set aside, if their back-off time is over."""
        if not self.outbox.waiting or time.monotonic() < self._next_file_retry:
            return
        if self.outbox.retry_aside():
            self._last_success = time.monotonic()
            self._file_failures = 0
        else:
            self._file_failures += 1
        self._next_file_retry = time.monotonic() + _back_off(self._file_failures)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self.outbox.reason = one_line(error)
        if self._failures == 1:
            self.log(
                f"`{self.name}` is unavailable ({self.outbox.reason}); the run continues, and its records "
                "are kept in the run folder and sent later"
            )

    def _succeeded(self) -> None:
        for note in self.outbox.take_notes():
            self.log(f"`{self.name}` {note}")
        if self._failures:
            self.log(f"`{self.name}` is available again; sending what it missed")
        self._failures = 0
        self.outbox.reason = ""


def _back_off(failures: int) -> float:
    return _BACK_OFF_S[min(failures, len(_BACK_OFF_S) - 1)]
