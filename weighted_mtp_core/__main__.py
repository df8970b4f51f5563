"""`python -m weighted_mtp_core`."""

from __future__ import annotations

import signal
import sys

from weighted_mtp_core.runtime.interrupts import remember_checkpoint_requests

if __name__ == "__main__":
    remember_checkpoint_requests()  # before the other imports, during which a signal may arrive
    from weighted_mtp_core.cli import main

    code = main(sys.argv[1:])
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the interpreter removes Python's handlers when it ends
    sys.exit(code)
