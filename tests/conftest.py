"""Settings of the tests in this folder: one thread, no telemetry, no model hub, no deadlines."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A process that a shell starts in the background ignores SIGINT, and a process that `nohup` starts ignores
# SIGHUP. The runs that tests interrupt would inherit this.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # first calls are slow on a busy machine
settings.load_profile("shared machine")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` on a machine without a CUDA device."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device here")
