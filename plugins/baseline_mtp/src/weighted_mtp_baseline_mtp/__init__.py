"""The baseline of weighted multi-token prediction: every response token counts the same.

This is the smallest whole plugin. It declares what it offers and imports nothing heavy; the algorithm stands
beside it in `_uniform.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attrs import frozen
from weighted_mtp_core.api import BuildContext, Component, WeightingStrategy, hookimpl


@frozen(kw_only=True)
class UniformOptions:
    """`[weighting.options]` of `baseline_mtp.uniform`: there are none."""


def build_uniform(options: UniformOptions, context: BuildContext) -> WeightingStrategy:
    """Build the weighting; torch is imported here and not on the way to `plugins list`."""
    del options, context
    from weighted_mtp_baseline_mtp._uniform import Uniform

    return Uniform()


@hookimpl
def wmtp_weighting_strategies() -> Iterable[Component[Any, WeightingStrategy]]:
    """Offer `baseline_mtp.uniform`."""
    yield Component(
        name="uniform",
        summary="The same weight for every response token: plain multi-token prediction.",
        options=UniformOptions,
        build=build_uniform,
    )
