"""Plugin `given`: the data contain the weights, for example from annotators or from another model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attrs import frozen
from weighted_mtp_core.api import BuildContext, Component, Signal, WeightingStrategy, hookimpl


@frozen(kw_only=True)
class WeightsOptions:
    """`[weighting.options]` of `given.weights`, which has no options."""


def build_weights(options: WeightsOptions, context: BuildContext) -> WeightingStrategy:
    """Build the weighting."""
    del options, context
    from weighted_mtp_given._weights import GivenWeights

    return GivenWeights()


@hookimpl
def wmtp_weighting_strategies() -> Iterable[Component[Any, WeightingStrategy]]:
    """Offer the weighting `given.weights`."""
    yield Component(
        name="weights",
        summary="The weights that come with the data, for whole responses or spans of characters.",
        options=WeightsOptions,
        build=build_weights,
        needs=frozenset({Signal.GIVEN}),
        negative_weights=True,
    )
