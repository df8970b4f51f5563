"""Weighted multi-token prediction: a core that knows no algorithm, and plugins that are one each."""

import os

# Here, since torch reads it once, when it is imported: on Apple's GPUs an operator that is missing then runs
# on the CPU. A value that is set already stays.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

__version__ = "0.1.0"
