"""The one exception family for what a user can get wrong, and its exit codes."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_RUN_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class WmtpError(Exception):
    """A mistake that a user can repair: printed as one `error:` line and a `hint:` line, without traceback.

    Args:
        message: What is wrong and where (file, line, key, or plugin distribution and version).
        hint: What to do about it.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class RunFailedError(WmtpError):
    """The input was right and the run failed all the same."""

    exit_code = EXIT_RUN_FAILED


class Terminated(KeyboardInterrupt):
    """The process was told to stop by SIGTERM."""
