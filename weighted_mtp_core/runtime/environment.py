"""Environment variables that torch and its libraries read once, when they are loaded."""

from __future__ import annotations

import os

SPIN_COUNT = 1000
"""Tries of a thread before it sleeps at a barrier; GNU OpenMP's own default is 300,000."""


def prepare_environment_for_torch() -> None:
    """Set the variables that torch reads when it is imported, unless the user has set them.

    Call it before the first import of torch.

    - `PYTORCH_ENABLE_MPS_FALLBACK`: an operator that Apple's GPUs lack runs on the CPU.
    - `GOMP_SPINCOUNT`: threads that wait at a barrier soon sleep. By default they spin for milliseconds, and
      beside another busy process they take the core from the thread that they wait for (figures in
      docs/performance.md). The number of threads stays, so results are the same to the bit. A user sets this
      with `OMP_WAIT_POLICY` too, which therefore also prevents the change.
    """
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
