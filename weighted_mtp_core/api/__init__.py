"""What a plugin imports, and all it imports: component kinds, the tensors they exchange, the hook marker.

Importing this package imports neither torch nor transformers nor mlflow.
"""

from __future__ import annotations

from weighted_mtp_core.api.components import (
    BuildContext,
    Component,
    Critic,
    ModelContext,
    Stateful,
    WeightingChoice,
    WeightingStrategy,
    hookimpl,
)
from weighted_mtp_core.api.data import (
    SPLITS,
    DatasetVersion,
    DataSource,
    Example,
    Problem,
    Split,
    Verdict,
    VerdictKind,
)
from weighted_mtp_core.api.tensors import Batch, CriticLoss, Scores, Signal, StepView, Weights
from weighted_mtp_core.api.tracking import MetricPoint, RunInfo, RunOutcome, Tracker
from weighted_mtp_core.errors import RunFailedError, WmtpError

__all__ = [
    "Batch",
    "BuildContext",
    "Component",
    "Critic",
    "CriticLoss",
    "DataSource",
    "DatasetVersion",
    "Example",
    "MetricPoint",
    "ModelContext",
    "Problem",
    "RunFailedError",
    "RunInfo",
    "RunOutcome",
    "SPLITS",
    "Scores",
    "Signal",
    "Split",
    "Stateful",
    "StepView",
    "Tracker",
    "Verdict",
    "VerdictKind",
    "WeightingChoice",
    "WeightingStrategy",
    "Weights",
    "WmtpError",
    "hookimpl",
]
