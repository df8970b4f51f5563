"""Settings that every test shares: one thread and float32, so that results are the same on a busy machine."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What a shell starts in the background ignores SIGINT, and what `nohup` starts ignores SIGHUP; so would the
# runs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # first calls are slow where others compute too
settings.load_profile("shared machine")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests of a GPU on a machine without one."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device here")
