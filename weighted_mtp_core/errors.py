"""Exceptions that end a command with an error message; `exit_codes.py` defines the exit codes."""

from __future__ import annotations

from weighted_mtp_core.exit_codes import EXIT_BAD_INPUT, EXIT_RUN_FAILED


class WmtpError(Exception):
    """An error that a user can correct; printed as `error:` and `hint:`, with a traceback if requested.

    Args:
        message: What is wrong and where: for example, the file, line and key, or the plugin and its version.
        hint: What the user can do about the error.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class RunFailedError(WmtpError):
    """A run or another command failed although its input was valid."""

    exit_code = EXIT_RUN_FAILED


class Terminated(KeyboardInterrupt):
    """The process was ended by SIGTERM or SIGHUP (see `runtime/interrupts.py`); the exit code is 143."""
