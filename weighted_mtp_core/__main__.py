"""`python -m weighted_mtp_core`."""

from __future__ import annotations

import sys

from weighted_mtp_core.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
