"""Selective language modelling (Rho-1, Lin et al. 2024): train mainly on tokens with a large excess loss.

The excess loss of a token is the policy's loss minus the loss of a frozen reference model. The critic
`rho1.reference` computes the losses of the reference model, and the weighting `rho1.excess_loss` selects the
tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from attrs import Attribute, field, frozen
from attrs import validators as v
from weighted_mtp_core.api import BuildContext, Component, Critic, Signal, WeightingStrategy, hookimpl


@frozen(kw_only=True)
class ExcessLossOptions:
    """`[weighting.options]` of `rho1.excess_loss`.

    Attributes:
        keep: Share of the batch's targets that are selected: those with the largest excess loss.
        per: `"head"` selects targets for each head separately; `"target"` selects the targets with the
            largest excess loss of head 1, for all heads.
        selection: `"top"` gives selected targets the weight 1 and all other targets the weight 0. `"soft"`
            gives each target the weight sigmoid((e - e_0) / temperature), where e is its excess loss and e_0
            the smallest excess loss that `"top"` selects.
        temperature: Scale of the sigmoid for `"soft"`, in nats.
    """

    keep: float = field(default=0.6, validator=[v.gt(0), v.le(1)])
    per: Literal["head", "target"] = "head"
    selection: Literal["top", "soft"] = "top"
    temperature: float = field(default=0.5, validator=v.gt(0))

    @temperature.validator
    def _check_temperature(self, attribute: Attribute[float], value: float) -> None:
        if self.selection != "soft" and value != attribute.default:
            raise ValueError(f'has no effect with `selection = "{self.selection}"`; leave it out: {value}')


def build_excess_loss(options: ExcessLossOptions, context: BuildContext) -> WeightingStrategy:
    """Build the weighting."""
    del context
    from weighted_mtp_rho1._excess_loss import ExcessLoss

    return ExcessLoss(options)


@hookimpl
def wmtp_weighting_strategies() -> Iterable[Component[Any, WeightingStrategy]]:
    """Offer the weighting `rho1.excess_loss`."""
    yield Component(
        name="excess_loss",
        summary="Larger weights where the policy's loss exceeds a reference model's loss the most.",
        options=ExcessLossOptions,
        build=build_excess_loss,
        needs=frozenset({Signal.TOKEN_LOSS, Signal.REFERENCE_LOSS}),
    )


@frozen(kw_only=True)
class ReferenceOptions:
    """`[critic.options]` of `rho1.reference`.

    Attributes:
        checkpoint: The reference model, trained on high-quality data: the folder or the `best_model.pt` of an
            earlier run with the same `[model]` table, or a transformers directory with the policy's
            tokenizer. By default, the reference model is the policy before training.
    """

    checkpoint: str | None = None


def build_reference(options: ReferenceOptions, context: BuildContext) -> Critic:
    """Build the critic."""
    from weighted_mtp_rho1._reference import Reference

    return Reference(options, context)


@hookimpl
def wmtp_critics() -> Iterable[Component[Any, Critic]]:
    """Offer the critic `rho1.reference`."""
    yield Component(
        name="reference",
        summary="Next-token losses of a frozen model: an earlier run, a directory, or the untrained policy.",
        options=ReferenceOptions,
        build=build_reference,
        provides=frozenset({Signal.REFERENCE_LOSS}),
    )
