"""Weights from the policy's current predictions.

The weighting `dft.probability` (dynamic fine-tuning, Wu et al. 2025) uses the policy's probability of the
target token. The weighting `dft.entropy` (Wang et al. 2025) uses the entropy of the policy's prediction.
"""

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
        floor: Smallest weight; 0 gives the weights of Wu et al. 2025, and 1 gives unweighted training.
    """

    floor: float = field(default=0.0, validator=[v.ge(0), v.le(1)])


def build_probability(options: ProbabilityOptions, context: BuildContext) -> WeightingStrategy:
    """Build the weighting."""
    del context
    from weighted_mtp_dft._probability import Probability

    return Probability(options)


@frozen(kw_only=True)
class EntropyOptions:
    """`[weighting.options]` of `dft.entropy`.

    Attributes:
        keep: Share of each head's targets in the batch to train on: those with the largest entropy; 1 gives
            unweighted training.
    """

    keep: float = field(default=0.2, validator=[v.gt(0), v.le(1)])


def build_entropy(options: EntropyOptions, context: BuildContext) -> WeightingStrategy:
    """Build the weighting."""
    del context
    from weighted_mtp_dft._entropy import Entropy

    return Entropy(options)


@hookimpl
def wmtp_weighting_strategies() -> Iterable[Component[Any, WeightingStrategy]]:
    """Offer the weightings `dft.probability` and `dft.entropy`."""
    yield Component(
        name="probability",
        summary="The policy's probability of the target, with a floor (dynamic fine-tuning).",
        options=ProbabilityOptions,
        build=build_probability,
        needs=frozenset({Signal.TOKEN_LOSS}),
    )
    yield Component(
        name="entropy",
        summary="Keeps the targets where the policy's entropy is largest (high-entropy tokens).",
        options=EntropyOptions,
        build=build_entropy,
        needs=frozenset({Signal.TOKEN_ENTROPY}),
    )
