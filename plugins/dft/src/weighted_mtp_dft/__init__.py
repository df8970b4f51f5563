"""Dynamic fine-tuning (Wu et al. 2025): each target weighs as much as the policy believes in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attrs import field, frozen
from attrs import validators as v
from weighted_mtp_core.api import BuildContext, Component, Signal, WeightingStrategy, hookimpl


@frozen(kw_only=True)
class ProbabilityOptions:
    """`[weighting.options]` of `dft.probability`.

    Attributes:
        floor: Smallest weight; 0 is the paper's, 1 is plain training.
    """

    floor: float = field(default=0.0, validator=[v.ge(0), v.le(1)])


def build_probability(options: ProbabilityOptions, context: BuildContext) -> WeightingStrategy:
    """Build the weighting."""
    del context
    from weighted_mtp_dft._probability import Probability

    return Probability(options)


@hookimpl
def wmtp_weighting_strategies() -> Iterable[Component[Any, WeightingStrategy]]:
    """Offer `dft.probability`."""
    yield Component(
        name="probability",
        summary="The policy's own probability of the target, with a floor (dynamic fine-tuning).",
        options=ProbabilityOptions,
        build=build_probability,
        needs=frozenset({Signal.TOKEN_LOSS}),
    )
