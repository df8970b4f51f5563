"""Correct weightings, and mutants for the checks that only weightings must pass."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import attrs
from weighted_mtp_core.api import Signal, WeightingStrategy, Weights, WmtpError


class SoundWeighting(WeightingStrategy):
    """Weighs by value, and remembers in training how many batches it saw."""

    caught_by: ClassVar[set[str]] = set()
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.REWARD, Signal.VALUE})

    def __init__(self, options: Any, context: Any) -> None:
        import torch

        self.torch = torch
        self.seen = 0

    def weigh(self, view: Any) -> Weights:
        self.seen += view.training
        scale = 1 + self.seen
        return Weights(weight=scale * view.value_BT * view.response_BT, metrics={"seen": float(self.seen)})

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        if set(state) != {"seen"}:
            raise WmtpError(f"unknown state: {sorted(state)}")
        self.seen = state["seen"]


class SoundPairWeighting(WeightingStrategy):
    """Weighs pairs of source and head, by the policy's own loss."""

    caught_by: ClassVar[set[str]] = set()
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.TOKEN_LOSS})

    def __init__(self, options: Any, context: Any) -> None:
        pass

    def weigh(self, view: Any) -> Weights:
        return Weights(weight=(-view.token_loss_BTK).exp() * view.target_BTK)


class SoundStateless(WeightingStrategy):
    """The correct weighting from which most mutants below differ in one property."""

    caught_by: ClassVar[set[str]] = set()
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.VALUE})

    def __init__(self, options: Any, context: Any) -> None:
        import torch

        self.torch = torch
        self.context = context

    def weigh(self, view: Any) -> Weights:
        return Weights(weight=(view.value_BT * view.response_BT).to(self.torch.float32))


class WrongShape(SoundStateless):
    caught_by: ClassVar = {"test_weights_have_a_shape_that_core_aligns"}

    def weigh(self, view: Any) -> Weights:
        return Weights(weight=super().weigh(view).weight[:, :, None])


class HalfPrecision(SoundStateless):
    caught_by: ClassVar = {"test_weights_are_float32"}

    def weigh(self, view: Any) -> Weights:
        return Weights(weight=super().weigh(view).weight.bfloat16())


class NotANumber(SoundStateless):
    caught_by: ClassVar = {"test_weights_are_finite"}

    def weigh(self, view: Any) -> Weights:
        value_BT = super().weigh(view).weight
        return Weights(weight=value_BT.where(~(view.response_BT & (value_BT > 0.8)), float("nan")))


class Infinite(SoundStateless):
    caught_by: ClassVar = {"test_weights_are_finite"}

    def weigh(self, view: Any) -> Weights:
        margin_BT = (0.8 - view.value_BT).clamp(min=0)
        return Weights(weight=(1 / margin_BT).where(view.response_BT, 0.0))


class SoundNegative(SoundStateless):
    """Declares its negative weights."""

    negative_weights = True

    def weigh(self, view: Any) -> Weights:
        return Weights(weight=-super().weigh(view).weight)


class Negative(SoundStateless):
    caught_by: ClassVar = {"test_weights_are_not_negative"}

    def weigh(self, view: Any) -> Weights:
        return Weights(weight=-super().weigh(view).weight)


class WeighsPrompts(SoundStateless):
    caught_by: ClassVar = {"test_weights_are_zero_where_nothing_is_predicted"}

    def weigh(self, view: Any) -> Weights:
        answered_B1 = view.response_BT.any(dim=1, keepdim=True)
        return Weights(weight=((view.document_BT >= 0) & answered_B1).float())


class WeighsPairsOffTarget(SoundPairWeighting):
    caught_by: ClassVar = {"test_weights_are_zero_where_nothing_is_predicted"}

    def weigh(self, view: Any) -> Weights:
        source_BT1 = (view.response_BT & (view.document_BT >= 0))[:, :, None]
        return Weights(weight=(view.target_BTK | source_BT1).float())


class LeaksGradient(SoundStateless):
    caught_by: ClassVar = {"test_weights_carry_no_gradient"}

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.scale = self.torch.nn.Parameter(self.torch.ones(()))

    def weigh(self, view: Any) -> Weights:
        return Weights(weight=self.scale * super().weigh(view).weight)


class MetricOfManyNumbers(SoundStateless):
    caught_by: ClassVar = {"test_metrics_are_finite_scalars"}

    def weigh(self, view: Any) -> Weights:
        weight_BT = super().weigh(view).weight
        return Weights(weight=weight_BT, metrics={"mean_of_each_row": weight_BT.mean(dim=1)})


class MetricThatIsNotFinite(SoundStateless):
    caught_by: ClassVar = {"test_metrics_are_finite_scalars"}

    def weigh(self, view: Any) -> Weights:
        weight_BT = super().weigh(view).weight
        log_of_smallest = weight_BT.amin().log() if view.response_BT.sum() > 1 else 0.0
        return Weights(weight=weight_BT, metrics={"log_of_smallest": log_of_smallest})


class PeeksAtUndeclared(SoundStateless):
    caught_by: ClassVar = {"test_undeclared_signals_change_no_weight"}

    def weigh(self, view: Any) -> Weights:
        return super().weigh(view) if view.reward_BT is None else Weights(weight=view.response_BT.float())


class ChangesTheView(SoundStateless):
    caught_by: ClassVar = {"test_leaves_the_view_as_it_is"}

    def weigh(self, view: Any) -> Weights:
        return Weights(weight=view.value_BT.mul_(view.response_BT).clone())


class DrawsFromEverybody(SoundStateless):
    caught_by: ClassVar = {"test_weighing_leaves_global_random_numbers_alone"}

    def weigh(self, view: Any) -> Weights:
        self.torch.rand(1)
        return super().weigh(view)


class ReadsPadding(SoundStateless):
    caught_by: ClassVar = {"test_padding_changes_no_weight"}

    def weigh(self, view: Any) -> Weights:
        scale = 1 + view.value_BT[view.document_BT < 0].abs().sum()
        return Weights(weight=scale * super().weigh(view).weight)


class ReadsPromptValues(SoundStateless):
    caught_by: ClassVar = {"test_values_inside_the_prompt_change_no_weight"}

    def weigh(self, view: Any) -> Weights:
        scale = 1 + view.value_BT[(view.document_BT >= 0) & ~view.response_BT].sum()
        return Weights(weight=scale * super().weigh(view).weight)


class AddsUpOverDocuments(SoundStateless):
    caught_by: ClassVar = {"test_packing_changes_no_weight"}

    def weigh(self, view: Any) -> Weights:
        sum_BT = (view.value_BT * view.response_BT).cumsum(dim=1)
        return Weights(weight=sum_BT * view.response_BT)


class DividesByNothing(SoundStateless):
    caught_by: ClassVar = {"test_a_batch_without_responses_has_no_weights"}

    def weigh(self, view: Any) -> Weights:
        return Weights(weight=view.response_BT / view.response_BT.sum())


class NeverForgetsAnEmptyBatch(SoundStateless):
    caught_by: ClassVar = {"test_a_batch_without_responses_has_no_weights"}

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.sum = 0.0

    def weigh(self, view: Any) -> Weights:
        if not view.response_BT.any():
            self.sum = float("nan")
        return Weights(weight=(super().weigh(view).weight + self.sum).where(view.response_BT, 0.0))


class SpreadOfOneToken(SoundStateless):
    caught_by: ClassVar = {"test_a_single_token_gets_a_weight"}

    def weigh(self, view: Any) -> Weights:
        if not view.response_BT.any():
            return super().weigh(view)
        return Weights(weight=super().weigh(view).weight * view.value_BT[view.response_BT].std())


class EveryObjectDiffers(SoundStateless):
    caught_by: ClassVar = {"test_equal_state_and_view_give_equal_weights"}

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.drawn = int.from_bytes(os.urandom(4), "big")

    def weigh(self, view: Any) -> Weights:
        scale = 1.0 if view.step == 0 else 1.0 + self.drawn / 2**32
        return Weights(weight=scale * super().weigh(view).weight)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: Any) -> None:
        if set(state) != {"drawn"}:
            raise WmtpError(f"unknown state: {sorted(state)}")
        self.drawn = state["drawn"]


class HiddenCounter(SoundWeighting):
    caught_by: ClassVar = {"test_state_survives_a_checkpoint"}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        if state:
            raise WmtpError(f"unknown state: {sorted(state)}")


class StateThatNoCheckpointHolds(SoundWeighting):
    caught_by: ClassVar = {"test_state_survives_a_checkpoint"}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": (self.seen,)}

    def load_state_dict(self, state: Any) -> None:
        if set(state) != {"seen"} or not isinstance(state["seen"], tuple):
            raise WmtpError(f"unknown state: {state}")
        (self.seen,) = state["seen"]


class LearnsFromValidation(SoundWeighting):
    caught_by: ClassVar = {"test_validation_changes_no_state"}

    def weigh(self, view: Any) -> Weights:
        return super().weigh(attrs.evolve(view, training=True))
