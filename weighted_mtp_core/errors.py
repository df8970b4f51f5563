"""The exceptions for errors that a user can correct. Each class has an exit code (`exit_codes.py`)."""

from __future__ import annotations

from weighted_mtp_core.exit_codes import EXIT_BAD_INPUT, EXIT_RUN_FAILED


class WmtpError(Exception):
    """An error that a user can correct; printed as an `error:` and a `hint:` line, without a traceback.

    Args:
        message: What is wrong and where (file, line, key, or plugin distribution and version).
        hint: What the user can do about it.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class RunFailedError(WmtpError):
    """The input was valid, but the run failed."""

    exit_code = EXIT_RUN_FAILED


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP ended the process (`runtime/interrupts.py`); the exit code is 143."""
