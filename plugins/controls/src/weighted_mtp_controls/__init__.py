"""Controls for any weighting, and combinators of weightings.

A control tests whether arbitrary weights with a similar distribution would have given the same result. Wrap
the weighting under test in `controls.shuffled`, which moves its weights to other tokens of the same response,
or in `controls.random_matched`, which replaces its weights with random weights of the same mean and standard
deviation, within the same range. For an exact ablation, `controls.record` saves the weights of every training
step, and `controls.replay` loads the saved weights in another run. The combinators `product`, `clip` and
`anneal` build a weighting from other weightings.

The option `of` is a table with the keys of a recipe's table `[weighting]` and selects the wrapped weighting;
in `product`, `of` is a list of such tables:

    [weighting]
    use = "controls.shuffled"
    [weighting.options.of]
    use = "verifiable.td_error"
    options.beta = 0.5
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from attrs import field, frozen
from attrs import validators as v
from weighted_mtp_core.api import BuildContext, Component, WeightingChoice, WeightingStrategy, hookimpl

_FOLDER = r"[A-Za-z0-9][A-Za-z0-9_-]*"


@frozen(kw_only=True)
class ShuffledOptions:
    """`[weighting.options]` of `controls.shuffled`: `of` is the weighting to shuffle."""

    of: WeightingChoice


def build_shuffled(options: ShuffledOptions, context: BuildContext) -> WeightingStrategy:
    """Build the control."""
    from weighted_mtp_controls._shuffled import Shuffled

    return Shuffled(context.build_weighting(options.of), seed=context.seed)


@frozen(kw_only=True)
class RandomMatchedOptions:
    """`[weighting.options]` of `controls.random_matched`: `of` is the weighting whose weights are matched."""

    of: WeightingChoice


def build_random_matched(options: RandomMatchedOptions, context: BuildContext) -> WeightingStrategy:
    """Build the control."""
    from weighted_mtp_controls._random_matched import RandomMatched

    return RandomMatched(context.build_weighting(options.of), seed=context.seed)


@frozen(kw_only=True)
class ProductOptions:
    """`[weighting.options]` of `controls.product`: `of` is a list of weightings to multiply."""

    of: tuple[WeightingChoice, ...] = field(validator=v.min_len(1))


def build_product(options: ProductOptions, context: BuildContext) -> WeightingStrategy:
    """Build the combinator."""
    from weighted_mtp_controls._combinators import Product

    return Product([context.build_weighting(each) for each in options.of])


@frozen(kw_only=True)
class ClipOptions:
    """`[weighting.options]` of `controls.clip`.

    Attributes:
        of: The weighting to clip.
        low: Lower limit of the weights; may be negative.
        high: Upper limit of the weights.
    """

    of: WeightingChoice
    low: float = field(default=0.0)
    high: float = field(default=3.0, validator=v.gt(0))

    @low.validator
    def _check_low(self, _: object, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(f"must be finite: {value}")

    @high.validator
    def _check_order(self, _: object, value: float) -> None:
        if value < self.low:
            raise ValueError(f"must be >= `low` = {self.low}: {value}")


def build_clip(options: ClipOptions, context: BuildContext) -> WeightingStrategy:
    """Build the combinator."""
    from weighted_mtp_controls._combinators import Clip

    return Clip(context.build_weighting(options.of), low=options.low, high=options.high)


@frozen(kw_only=True)
class AnnealOptions:
    """`[weighting.options]` of `controls.anneal`.

    Attributes:
        of: The weighting whose weights are used at the end.
        start: Step of the policy's training up to which all weights are 1.
        end: Step of the policy's training from which only the weights of `of` are used.
    """

    of: WeightingChoice
    start: int = field(default=0, validator=v.ge(0))
    end: int = field(validator=v.ge(1))

    @end.validator
    def _check_order(self, _: object, value: int) -> None:
        if value <= self.start:
            raise ValueError(f"must be > `start` = {self.start}: {value}")


def build_anneal(options: AnnealOptions, context: BuildContext) -> WeightingStrategy:
    """Build the combinator."""
    from weighted_mtp_controls._combinators import Anneal

    return Anneal(context.build_weighting(options.of), start=options.start, end=options.end)


@frozen(kw_only=True)
class RecordOptions:
    """`[weighting.options]` of `controls.record`.

    Attributes:
        of: The weighting to record.
        name: The weights are saved in the folder `<storage>/weights/<name>/`.
    """

    of: WeightingChoice
    name: str = field(validator=v.matches_re(_FOLDER))


def build_record(options: RecordOptions, context: BuildContext) -> WeightingStrategy:
    """Build the weighting that records weights."""
    from weighted_mtp_controls._recorded import Record

    folder = context.storage / "weights" / options.name
    return Record(context.build_weighting(options.of), folder=folder)


@frozen(kw_only=True)
class ReplayOptions:
    """`[weighting.options]` of `controls.replay`: `name` is the option `name` of `controls.record`."""

    name: str = field(validator=v.matches_re(_FOLDER))


def build_replay(options: ReplayOptions, context: BuildContext) -> WeightingStrategy:
    """Build the weighting that replays recorded weights.

    Raises:
        WmtpError: No weights were recorded under the name `options.name`.
    """
    from weighted_mtp_controls._recorded import Replay

    return Replay(folder=context.storage / "weights" / options.name)


@hookimpl
def wmtp_weighting_strategies() -> Iterable[Component[Any, WeightingStrategy]]:
    """Offer two controls, three combinators, and two weightings that record and replay weights."""
    yield Component(
        name="shuffled",
        summary="Control: another weighting's weights, shuffled within each response.",
        options=ShuffledOptions,
        build=build_shuffled,
        negative_weights=True,
    )
    yield Component(
        name="random_matched",
        summary="Control: random weights with the mean, standard deviation and range of another weighting's.",
        options=RandomMatchedOptions,
        build=build_random_matched,
        negative_weights=True,
    )
    yield Component(
        name="product",
        summary="The product of several weightings.",
        options=ProductOptions,
        build=build_product,
        negative_weights=True,
    )
    yield Component(
        name="clip",
        summary="Another weighting, clipped to a range.",
        options=ClipOptions,
        build=build_clip,
        negative_weights=True,
    )
    yield Component(
        name="anneal",
        summary="From uniform weights to another weighting's, over a span of steps.",
        options=AnnealOptions,
        build=build_anneal,
        negative_weights=True,
    )
    yield Component(
        name="record",
        summary="Another weighting; saves its weights at every training step.",
        options=RecordOptions,
        build=build_record,
        negative_weights=True,
    )
    yield Component(
        name="replay",
        summary="The weights that `record` saved, step by step.",
        options=ReplayOptions,
        build=build_replay,
        negative_weights=True,
    )
