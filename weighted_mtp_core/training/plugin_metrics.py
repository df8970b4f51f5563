"""Checks that metrics of weightings and critics are scalars and do not have the names of core's metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from weighted_mtp_core.errors import RunFailedError

_CORE = re.compile(
    r"(policy|critic|pass_at|verdict|acceptance)_.*|system/.*|.*_tokens_per_second"
    r"|(train|validation|test)_(loss|ce|accuracy|acceptance)(_head_\d+|_length)?(_of_\d+_examples)?"
    r"|value_loss|weight_(mean|entropy|p\d+|between_responses|(before|at|behind)_slip)|effective_sample_share"
    r"|tokens_per_forward|finished_share"
)
"""Matches every name that is reserved for metrics of core."""


def is_core_metric(name: str) -> bool:
    """Return whether the name is reserved for metrics of core."""
    return _CORE.fullmatch(name) is not None


def check_metrics(metrics: Mapping[str, object], *, label: str) -> None:
    """Check the metrics of a plugin; reads no values from the device.

    Args:
        metrics: The metrics by name.
        label: The component's address, plugin, distribution and version, for messages.

    Raises:
        RunFailedError: A metric has a name that is reserved for core, or is neither a number nor a 0-dim
            tensor.
    """
    for name, value in metrics.items():
        if is_core_metric(name):
            raise RunFailedError(
                f"{label} returned a metric `{name}`, which is the name of a metric of core",
                hint="give the metric a name of its own",
            )
        if not isinstance(value, int | float) and not (isinstance(value, Tensor) and value.ndim == 0):
            what = (
                f"shape {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else f"type `{type(value).__name__}`"
            )
            raise RunFailedError(f"{label} returned a metric `{name}` of {what}, expected a number")
