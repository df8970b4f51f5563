"""Settings that every test shares: one thread and float32, so that results are the same on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # first calls are slow where others compute too
settings.load_profile("shared machine")
