"""What a plugin imports, and all it imports: component kinds, the tensors they exchange, the hook marker.

Importing this package imports neither torch nor transformers nor mlflow.
"""

from __future__ import annotations

from weighted_mtp_core.api.components import (
    SAME_RESULT,
    BuildContext,
    Component,
    Critic,
    Finding,
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
    is_correct,
)
from weighted_mtp_core.api.tensors import Batch, CriticLoss, Scores, Signal, StepView, Weights
from weighted_mtp_core.api.tracking import MetricPoint, RunInfo, RunOutcome, Tracker
from weighted_mtp_core.errors import RunFailedError, WmtpError

__all__ = [
    "SAME_RESULT",
    "SPLITS",
    "Batch",
    "BuildContext",
    "Component",
    "Critic",
    "CriticLoss",
    "DataSource",
    "DatasetVersion",
    "Example",
    "Finding",
    "MetricPoint",
    "ModelContext",
    "Problem",
    "RunFailedError",
    "RunInfo",
    "RunOutcome",
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
    "is_correct",
]
