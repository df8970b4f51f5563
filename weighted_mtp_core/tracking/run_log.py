"""The log file of a process, such as `logs/training.log`, with messages and warnings but without secrets."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

from attrs import define, field

from weighted_mtp_core.redaction import redact

LOGGER = "weighted_mtp_core"
_SOURCES = (LOGGER, "py.warnings")


class _Formatter(logging.Formatter):
    """Formats a record, then removes secrets from the whole text, including tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


@define(eq=False)
class RunLog:
    """The open log file, which also receives the framework's log records and Python's warnings."""

    _handler: logging.FileHandler
    _level_before: int = field(init=False, default=logging.NOTSET)

    @classmethod
    def open(cls, path: Path) -> RunLog:
        """Open the log file at `path` for appending, and create it if it does not exist."""
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
        log = cls(handler)
        log._level_before = logging.getLogger(LOGGER).level
        logging.getLogger(LOGGER).setLevel(logging.INFO)
        for name in _SOURCES:
            logging.getLogger(name).addHandler(handler)
        logging.captureWarnings(capture=True)
        return log

    def write(self, text: str) -> None:
        """Add a message to the log file."""
        self._handler.handle(logging.LogRecord(LOGGER, logging.INFO, "", 0, text, None, None))

    def write_failure(self, error: BaseException) -> None:
        """Add the traceback of the exception that ended the run to the log file."""
        self.write("".join(traceback.format_exception(error)).rstrip())

    def close(self) -> None:
        """Close the log file, which then receives no further log records."""
        for name in _SOURCES:
            logging.getLogger(name).removeHandler(self._handler)
        logging.getLogger(LOGGER).setLevel(self._level_before)
        logging.captureWarnings(capture=False)
        self._handler.close()
