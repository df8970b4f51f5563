"""The baseline of weighted multi-token prediction: all response tokens have the same weight.

This plugin is a small, complete example. This module declares the weighting and does not import torch;
`_uniform.py` contains the algorithm.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attrs import frozen
from weighted_mtp_core.api import BuildContext, Component, WeightingStrategy, hookimpl


@frozen(kw_only=True)
class UniformOptions:
    """`[weighting.options]` of `baseline_mtp.uniform`, which has no options."""


def build_uniform(options: UniformOptions, context: BuildContext) -> WeightingStrategy:
    """Build the weighting; torch is imported only here, so that `plugins show` and `check` stay fast."""
    del options, context
    from weighted_mtp_baseline_mtp._uniform import Uniform

    return Uniform()


@hookimpl
def wmtp_weighting_strategies() -> Iterable[Component[Any, WeightingStrategy]]:
    """Offer the weighting `baseline_mtp.uniform`."""
    yield Component(
        name="uniform",
        summary="The same weight for every response token: unweighted multi-token prediction.",
        options=UniformOptions,
        build=build_uniform,
    )
