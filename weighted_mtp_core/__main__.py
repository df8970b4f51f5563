"""The entry point of `python -m weighted_mtp_core`."""

from __future__ import annotations

import atexit
import os
import signal
import sys

from weighted_mtp_core.runtime.interrupts import remember_checkpoint_requests

_exit_code: list[int] = []


def _exit_at_once() -> None:
    """End the process without the interpreter's own exit, which takes 2 s to free torch and MLflow."""
    if _exit_code:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(_exit_code[0])


if __name__ == "__main__":
    atexit.register(_exit_at_once)  # registered before the other imports, so that it is called last
    remember_checkpoint_requests()  # called before the other imports, during which a signal may arrive
    from weighted_mtp_core.cli import main

    _exit_code.append(main(sys.argv[1:]))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the interpreter removes Python's handlers at its end
    sys.exit(_exit_code[0])
