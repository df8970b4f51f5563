"""The exceptions for what a user can repair. Each class has an exit code (`exit_codes.py`)."""

from __future__ import annotations

from weighted_mtp_core.exit_codes import EXIT_BAD_INPUT, EXIT_RUN_FAILED


class WmtpError(Exception):
    """A mistake that a user can correct: printed as an `error:` line and a `hint:` line, without a traceback.

    Args:
        message: What is wrong and where (file, line, key, or plugin distribution and version).
        hint: What to do about it.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class RunFailedError(WmtpError):
    """The input was valid and the run failed all the same."""

    exit_code = EXIT_RUN_FAILED


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP ended the process (`runtime/interrupts.py`); the exit code is 143."""
