"""A plugin with components that each violate one rule, and with correct components.

The attribute `caught_by` of a class names the checks that must fail for it; no other check may fail.
`test_suites.py` runs the suites on all classes. Components with names that begin with `Sound` are correct;
each mutant changes one property of a correct component.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
from attrs import frozen
from weighted_mtp_core.api import (
    Component,
    Critic,
    CriticLoss,
    DatasetVersion,
    DataSource,
    Example,
    Problem,
    RunOutcome,
    Scores,
    Signal,
    Tracker,
    Verdict,
    VerdictKind,
    WeightingStrategy,
    Weights,
    WmtpError,
    hookimpl,
)


@frozen(kw_only=True)
class NoOptions:
    """Nothing to choose."""


def component(cls: type[Any], **signals: Any) -> Component[Any, Any]:
    """Declare a class as a component; the class may have `summary`, `options` and `build`."""
    return Component(
        name=name_of(cls),
        summary=getattr(cls, "summary", "One mutant."),
        options=getattr(cls, "options", NoOptions),
        build=getattr(cls, "build", cls),
        **signals,
    )


def name_of(cls: type[Any]) -> str:
    """Return the name in snake case: `sound_file` for the class `SoundFile`."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("_")


# --------------------------------------------------------------------------- weightings


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


class TwoLineSummary(SoundStateless):
    caught_by: ClassVar = {"test_summary_is_one_line"}
    summary = "One line\nand another."


@attrs.define(kw_only=True)
class MutableOptions:
    beta: float = 1.0


class OptionsThatChange(SoundStateless):
    caught_by: ClassVar = {"test_options_are_frozen"}
    options = MutableOptions


@frozen
class PositionalOptions:
    beta: float = 1.0


class OptionsByPosition(SoundStateless):
    caught_by: ClassVar = {"test_options_are_keyword_only"}
    options = PositionalOptions


@frozen(kw_only=True)
class UntypedOptions:
    beta: Any = 1.0


class OptionsOfAnyType(SoundStateless):
    caught_by: ClassVar = {"test_options_are_typed"}
    options = UntypedOptions


@frozen(kw_only=True)
class DriftingOptions:
    beta: float = attrs.field(default=1.0, converter=lambda beta: beta / 2)


class OptionsThatDrift(SoundStateless):
    caught_by: ClassVar = {"test_options_survive_a_resolved_recipe"}
    options = DriftingOptions


class OfNoKind:
    caught_by: ClassVar = {"test_builds_its_kind"}
    needs = SoundStateless.needs

    def __init__(self, options: Any, context: Any) -> None:
        self._inner = SoundStateless(options, context)
        self.weigh = self._inner.weigh
        self.state_dict = self._inner.state_dict
        self.load_state_dict = self._inner.load_state_dict


class SeedsEverybody(SoundStateless):
    caught_by: ClassVar = {"test_building_leaves_global_random_numbers_alone"}

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.torch.manual_seed(context.seed)


class BuiltOnce(SoundStateless):
    caught_by: ClassVar = {"test_builds_a_new_object_each_time"}
    objects: ClassVar[list[Any]] = []

    @classmethod
    def build(cls, options: Any, context: Any) -> BuiltOnce:
        if not cls.objects:
            cls.objects.append(cls(options, context))
        return cls.objects[0]


class TakesAnyState(SoundStateless):
    caught_by: ClassVar = {"test_refuses_state_that_it_does_not_keep"}

    def load_state_dict(self, state: Any) -> None:
        pass


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


# --------------------------------------------------------------------------- critics


def _same_document_before(batch: Any) -> Any:
    same_BT = batch.document_BT.clone().bool()
    same_BT[:, 0] = False
    same_BT[:, 1:] = batch.document_BT[:, 1:] == batch.document_BT[:, :-1]
    return same_BT


class SoundCritic(Critic):
    """A linear value of each token's embedding, trained on the reward."""

    caught_by: ClassVar[set[str]] = set()
    provides: ClassVar[frozenset[Signal]] = frozenset({Signal.VALUE})
    trainable = True
    reads_policy = False

    def __init__(self, options: Any, context: Any) -> None:
        import torch

        self.torch = torch
        generator = torch.Generator().manual_seed(context.seed)
        self.weight_VH = torch.nn.Parameter(torch.randn(32, 4, generator=generator))
        self.read_H = torch.nn.Parameter(torch.randn(4, generator=generator))

    def logit(self, batch: Any, hidden_BTH: Any) -> Any:
        return (self.weight_VH[batch.ids_BT] @ self.read_H).float()

    def score(self, batch: Any, hidden_BTH: Any) -> Scores:
        with self.torch.no_grad():
            return Scores(value_BT=self.logit(batch, hidden_BTH).sigmoid())

    def loss(self, batch: Any, hidden_BTH: Any) -> CriticLoss:
        error_BT = (self.logit(batch, hidden_BTH).sigmoid() - batch.reward_BT) ** 2
        count = batch.response_BT.sum()
        loss = (error_BT * batch.response_BT).sum() / count.clamp(min=1)
        return CriticLoss(loss=loss, metrics={"tokens": count})

    def parameters(self) -> Any:
        return [self.weight_VH, self.read_H]

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight_VH.detach(), "read": self.read_H.detach()}

    def load_state_dict(self, state: Any) -> None:
        if set(state) != {"weight", "read"}:
            raise WmtpError(f"unknown state: {sorted(state)}")
        with self.torch.no_grad():
            self.weight_VH.copy_(state["weight"])
            self.read_H.copy_(state["read"])


class SoundReader(SoundCritic):
    """Reads the policy's states, detached."""

    reads_policy = True

    def logit(self, batch: Any, hidden_BTH: Any) -> Any:
        return super().logit(batch, None) + hidden_BTH.detach().mean(dim=-1)


class SoundReaderOfPositions(SoundCritic):
    """Values fall with the position in the document, which a batch contains only if rows are packed."""

    def logit(self, batch: Any, hidden_BTH: Any) -> Any:
        position_BT = batch.position_BT
        if position_BT is None:
            position_BT = self.torch.arange(batch.ids_BT.shape[1]).expand_as(batch.ids_BT)
        return super().logit(batch, hidden_BTH) - 0.1 * position_BT


class SoundReference(Critic):
    """Is never trained; the reference loss of a response token equals its id."""

    caught_by: ClassVar[set[str]] = set()
    provides: ClassVar[frozenset[Signal]] = frozenset({Signal.REFERENCE_LOSS})
    reads_policy = False

    def __init__(self, options: Any, context: Any) -> None:
        pass

    def score(self, batch: Any, hidden_BTH: Any) -> Scores:
        return Scores(reference_loss_BT=batch.ids_BT.float() * batch.response_BT)


class SoundPairs(SoundCritic):
    """Compares a correct response with an incorrect one."""

    batching = "pairs"

    def loss(self, batch: Any, hidden_BTH: Any) -> CriticLoss:
        score_BT = self.logit(batch, None) * batch.response_BT
        right_P, wrong_P = score_BT.mean(dim=1).view(-1, 2).unbind(dim=1)
        return CriticLoss(loss=self.torch.nn.functional.softplus(wrong_P - right_P).mean())


class FillsMore(SoundCritic):
    caught_by: ClassVar = {"test_fills_exactly_what_it_provides"}

    def score(self, batch: Any, hidden_BTH: Any) -> Scores:
        value_BT = super().score(batch, hidden_BTH).value_BT
        return Scores(value_BT=value_BT, reference_loss_BT=value_BT)


class DoublePrecision(SoundCritic):
    caught_by: ClassVar = {"test_scores_are_one_finite_float32_a_token"}

    def score(self, batch: Any, hidden_BTH: Any) -> Scores:
        return Scores(value_BT=super().score(batch, hidden_BTH).value_BT.double())


class RoundedScores(SoundCritic):
    caught_by: ClassVar = {"test_autocast_changes_neither_dtypes_nor_what_is_trained"}

    def logit(self, batch: Any, hidden_BTH: Any) -> Any:
        return self.weight_VH[batch.ids_BT] @ self.read_H


class ScoresWithGradient(SoundCritic):
    caught_by: ClassVar = {"test_scores_carry_no_gradient"}

    def score(self, batch: Any, hidden_BTH: Any) -> Scores:
        return Scores(value_BT=self.logit(batch, hidden_BTH).sigmoid())


class SeesTheNextToken(SoundCritic):
    caught_by: ClassVar = {"test_a_score_depends_only_on_the_tokens_up_to_its_own"}

    def logit(self, batch: Any, hidden_BTH: Any) -> Any:
        logit_BT = super().logit(batch, hidden_BTH)
        follows_BT = _same_document_before(batch).roll(-1, dims=1) & (batch.document_BT >= 0)
        return logit_BT + logit_BT.roll(-1, dims=1) * follows_BT


class SeesTheReward(SoundCritic):
    caught_by: ClassVar = {"test_scores_do_not_depend_on_the_reward"}

    def score(self, batch: Any, hidden_BTH: Any) -> Scores:
        return Scores(value_BT=super().score(batch, hidden_BTH).value_BT + batch.reward_BT)


class SeesPadding(SoundCritic):
    caught_by: ClassVar = {"test_padding_changes_no_score"}

    def logit(self, batch: Any, hidden_BTH: Any) -> Any:
        return super().logit(batch, hidden_BTH) + batch.ids_BT[batch.document_BT < 0].sum()


class CountsColumns(SoundCritic):
    caught_by: ClassVar = {"test_packing_changes_no_score"}

    def logit(self, batch: Any, hidden_BTH: Any) -> Any:
        return super().logit(batch, hidden_BTH) + 0.1 * self.torch.arange(batch.ids_BT.shape[1])


class ScoresAnewEachTime(SoundCritic):
    caught_by: ClassVar = {"test_scoring_again_gives_the_same_scores"}

    def score(self, batch: Any, hidden_BTH: Any) -> Scores:
        seen = (batch.ids_BT.tolist(), batch.reward_BT.tolist())
        again = getattr(self, "last", None) == seen
        self.last = seen
        return Scores(value_BT=super().score(batch, hidden_BTH).value_BT + 0.1 * again)


class ChangesTheBatch(SoundCritic):
    caught_by: ClassVar = {"test_leaves_the_batch_as_it_is"}

    def loss(self, batch: Any, hidden_BTH: Any) -> CriticLoss:
        batch.reward_BT.clamp_(0.1, 0.9)
        return super().loss(batch, hidden_BTH)


class StartsAnywhere(SoundCritic):
    caught_by: ClassVar = {"test_equal_seeds_build_equal_critics"}

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, attrs.evolve(context, seed=int.from_bytes(os.urandom(4), "big")))


class SavesHalf(SoundCritic):
    caught_by: ClassVar = {"test_state_survives_a_checkpoint"}

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight_VH.detach()}

    def load_state_dict(self, state: Any) -> None:
        if set(state) != {"weight"}:
            raise WmtpError(f"unknown state: {sorted(state)}")
        with self.torch.no_grad():
            self.weight_VH.copy_(state["weight"])


class WantsTriples(SoundCritic):
    caught_by: ClassVar = {"test_batching_is_a_known_one"}
    batching = "triples"


class ParametersForNothing(SoundCritic):
    caught_by: ClassVar = {"test_only_a_trainable_critic_has_parameters"}
    trainable = False


class LossOfDoublePrecision(SoundCritic):
    caught_by: ClassVar = {"test_the_loss_is_a_finite_float32_scalar"}

    def loss(self, batch: Any, hidden_BTH: Any) -> CriticLoss:
        return CriticLoss(loss=super().loss(batch, hidden_BTH).loss.double())


class MetricWithGradient(SoundCritic):
    caught_by: ClassVar = {"test_the_loss_is_a_finite_float32_scalar"}

    def loss(self, batch: Any, hidden_BTH: Any) -> CriticLoss:
        loss = super().loss(batch, hidden_BTH).loss
        return CriticLoss(loss=loss, metrics={"again": loss})


class TrainsTheTrunk(SoundReader):
    caught_by: ClassVar = {"test_gradients_do_not_reach_the_trunk"}

    def logit(self, batch: Any, hidden_BTH: Any) -> Any:
        return SoundCritic.logit(self, batch, None) + hidden_BTH.mean(dim=-1)


class ForgetsAParameter(SoundCritic):
    caught_by: ClassVar = {"test_gradients_reach_every_listed_parameter_and_no_other"}

    def parameters(self) -> Any:
        return [self.read_H]


class ListsAParameterInVain(SoundCritic):
    caught_by: ClassVar = {"test_gradients_reach_every_listed_parameter_and_no_other"}

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.unused = self.torch.nn.Parameter(self.torch.zeros(3))

    def parameters(self) -> Any:
        return [*super().parameters(), self.unused]


class NeverLearns(SoundCritic):
    caught_by: ClassVar = {"test_training_on_one_batch_lowers_its_loss"}

    def loss(self, batch: Any, hidden_BTH: Any) -> CriticLoss:
        return CriticLoss(loss=1 + 0 * super().loss(batch, hidden_BTH).loss)


class MeanOfNothing(SoundCritic):
    caught_by: ClassVar = {"test_a_batch_without_responses_gives_a_finite_loss"}

    def loss(self, batch: Any, hidden_BTH: Any) -> CriticLoss:
        error_BT = (self.logit(batch, hidden_BTH).sigmoid() - batch.reward_BT) ** 2
        return CriticLoss(loss=error_BT[batch.response_BT].mean())


class DrawsWhileTraining(SoundCritic):
    caught_by: ClassVar = {"test_training_leaves_global_random_numbers_alone"}

    def loss(self, batch: Any, hidden_BTH: Any) -> CriticLoss:
        self.torch.rand(1)
        return super().loss(batch, hidden_BTH)


# --------------------------------------------------------------------------- data sources


@frozen(kw_only=True)
class NumberOptions:
    shift: int = 0


class SoundNumbers(DataSource):
    """Numbers to be doubled; problem n belongs to split n % 3; every other response is wrong."""

    caught_by: ClassVar[set[str]] = set()
    options = NumberOptions
    splits: ClassVar = {"train": 0, "validation": 1, "test": 2}

    def __init__(self, options: Any, context: Any) -> None:
        self.shift = options.shift

    def examples(self, split: Any) -> Sequence[Example]:
        return [
            Example(
                example_id=f"{n}/{reward:.0f}",
                problem_id=str(n),
                prompt=f"Twice {n + self.shift} is ",
                response=str(2 * (n + self.shift) + 1 - int(reward)),
                reward=reward,
            )
            for n in range(self.splits[split], 24, 3)
            for reward in (1.0, 0.0)
        ]

    def version(self) -> DatasetVersion:
        text = "".join(repr(self.examples(split)) for split in self.splits)
        return DatasetVersion(name="numbers", version="1", sha256=hashlib.sha256(text.encode()).hexdigest())

    def problems(self, split: Any) -> Sequence[Problem]:
        return [
            Problem(
                problem_id=str(n),
                prompt=f"Twice {n + self.shift} is ",
                entry_point="none",
                tests="",
                solution=str(2 * (n + self.shift)),
            )
            for n in range(self.splits[split], 24, 3)
        ]

    def verify(self, attempts: Any) -> list[Verdict]:
        return [
            Verdict(kind=VerdictKind.PASSED if completion == problem.solution else VerdictKind.WRONG)
            for problem, completion in attempts
        ]


class SoundWithoutProblems(SoundNumbers):
    """Cannot verify, and says so."""

    problems = DataSource.problems
    verify = DataSource.verify


class NothingToImitate(SoundNumbers):
    caught_by: ClassVar = {"test_there_is_something_to_train_on"}

    def policy_examples(self, split: Any) -> Sequence[Example]:
        return []


class Rotating(Sequence[Example]):
    """Iteration begins with the second item and ends with the first, unlike access by index."""

    def __init__(self, items: list[Example]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: Any) -> Any:
        return self.items[i]

    def __iter__(self) -> Any:
        return iter([*self.items[1:], self.items[0]])


class OrderOfItsOwn(SoundNumbers):
    caught_by: ClassVar = {"test_examples_are_random_access"}

    def examples(self, split: Any) -> Sequence[Example]:
        return Rotating(list(super().examples(split)))

    def version(self) -> DatasetVersion:
        return SoundNumbers(NumberOptions(shift=self.shift), None).version()


class EmptyResponse(SoundNumbers):
    caught_by: ClassVar = {"test_prompts_and_responses_hold_text"}

    def examples(self, split: Any) -> Sequence[Example]:
        first, *others = super().examples(split)
        return [attrs.evolve(first, response=""), *others]


class AnotherOrderEachTime(SoundNumbers):
    caught_by: ClassVar = {"test_the_same_examples_come_twice_in_the_same_order"}

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.asked = 0

    def examples(self, split: Any) -> Sequence[Example]:
        self.asked += 1
        examples = super().examples(split)
        return examples[::-1] if self.asked % 2 == 0 else examples

    def version(self) -> DatasetVersion:
        return SoundNumbers(NumberOptions(shift=self.shift), None).version()


class OrderOfASet(SoundNumbers):
    caught_by: ClassVar = {"test_examples_do_not_depend_on_the_hash_seed"}

    def examples(self, split: Any) -> Sequence[Example]:
        by_id = {example.example_id: example for example in super().examples(split)}
        return [by_id[name] for name in set(by_id)]


class SameIdsInEverySplit(SoundNumbers):
    caught_by: ClassVar = {"test_example_ids_are_unique"}

    def examples(self, split: Any) -> Sequence[Example]:
        return [attrs.evolve(each, example_id=str(i)) for i, each in enumerate(super().examples(split))]


class TrainsOnTheTest(SoundNumbers):
    caught_by: ClassVar = {"test_splits_share_no_problem"}

    def policy_examples(self, split: Any) -> Sequence[Example]:
        return [*super().policy_examples(split), *super().policy_examples("test")]


class ShortSha(SoundNumbers):
    caught_by: ClassVar = {"test_the_version_names_the_data"}

    def version(self) -> DatasetVersion:
        return attrs.evolve(super().version(), sha256=super().version().sha256[:36])


class VersionOfNothing(SoundNumbers):
    caught_by: ClassVar = {"test_other_data_have_another_sha256"}

    def version(self) -> DatasetVersion:
        return attrs.evolve(super().version(), sha256="0" * 64)


class VerdictsInAnyOrder(SoundNumbers):
    caught_by: ClassVar = {"test_verdicts_tell_right_from_wrong_in_order"}

    def verify(self, attempts: Any) -> list[Verdict]:
        return super().verify(attempts)[::-1]


class PassesEverything(SoundNumbers):
    caught_by: ClassVar = {"test_verdicts_tell_right_from_wrong_in_order"}

    def verify(self, attempts: Any) -> list[Verdict]:
        return [Verdict(kind=VerdictKind.PASSED) for _ in attempts]


class VerifiesNothing(SoundWithoutProblems):
    caught_by: ClassVar = {"test_a_source_without_problems_says_so"}

    def verify(self, attempts: Any) -> list[Verdict]:
        return []


# --------------------------------------------------------------------------- trackers


class SoundFile(Tracker):
    """Keeps each run as a JSON file."""

    caught_by: ClassVar[set[str]] = set()

    def __init__(self, options: Any, context: Any) -> None:
        self.folder: Path = context.storage / "tracked"
        self.path: Path | None = None

    def _change(self, **changes: Any) -> None:
        if self.path is None:
            raise WmtpError("no run was started")
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = json.loads(self.path.read_text()) if self.path.exists() else {"metrics": {}, "tags": {}}
        for key, value in changes.items():
            if isinstance(value, dict):
                stored[key] |= value
            else:
                stored[key] = value
        self.path.write_text(json.dumps(stored))

    def start(self, run: Any) -> None:
        self.path = self.folder / f"{run.run_id}.json"
        self._change(tags=dict(run.tags))

    def log_metrics(self, points: Any) -> None:
        if points:
            self._change(metrics={f"{point.name}@{point.step}": point.value for point in points})

    def log_artifact(self, path: Any, subdir: str) -> None:
        self._change(**{f"artifact {subdir}/{path.name}": path.read_text()})

    def set_tags(self, tags: Any) -> None:
        self._change(tags=dict(tags))

    def finish(self, outcome: Any, *, time_ms: int | None = None) -> None:
        self._change(outcome=outcome.value)


class KilledIsNoEnd(SoundFile):
    caught_by: ClassVar = {"test_a_run_ends_in_every_outcome"}

    def finish(self, outcome: Any, *, time_ms: int | None = None) -> None:
        if outcome is RunOutcome.KILLED:
            raise ValueError(outcome)
        super().finish(outcome)


class EndsNow(SoundFile):
    caught_by: ClassVar = {"test_a_run_ends_at_a_given_time"}

    def finish(self, outcome: Any) -> None:  # type: ignore[override]
        super().finish(outcome)


class StartsOnce(SoundFile):
    caught_by: ClassVar = {"test_starting_again_reopens_the_run"}

    def start(self, run: Any) -> None:
        if self.path is not None:
            raise RuntimeError("already started")
        super().start(run)


class StartsOnlyNewRuns(SoundFile):
    caught_by: ClassVar = {"test_another_object_reopens_the_run"}

    def start(self, run: Any) -> None:
        if self.path is None and (self.folder / f"{run.run_id}.json").exists():
            raise FileExistsError(run.run_id)
        super().start(run)


class EndsOnce(SoundFile):
    caught_by: ClassVar = {"test_everything_may_be_sent_twice"}
    ended = False

    def start(self, run: Any) -> None:
        super().start(run)
        self.ended = False

    def finish(self, outcome: Any, *, time_ms: int | None = None) -> None:
        if self.ended:
            raise RuntimeError("already ended")
        super().finish(outcome)
        self.ended = True


class NoArtifactAfterTheEnd(EndsOnce):
    caught_by: ClassVar = {"test_artifacts_may_come_after_the_end"}

    def log_artifact(self, path: Any, subdir: str) -> None:
        if self.ended:
            raise RuntimeError("already ended")
        super().log_artifact(path, subdir)

    def finish(self, outcome: Any, *, time_ms: int | None = None) -> None:
        SoundFile.finish(self, outcome)
        self.ended = True


class SpoiltByAnEarlyEnd(SoundFile):
    caught_by: ClassVar = {"test_finishing_before_the_start_breaks_nothing"}

    def start(self, run: Any) -> None:
        if self.path == self.folder:
            raise RuntimeError("already ended")
        super().start(run)

    def finish(self, outcome: Any, *, time_ms: int | None = None) -> None:
        self.path = self.path or self.folder
        super().finish(outcome)


class FewAtATime(SoundFile):
    caught_by: ClassVar = {"test_a_thousand_points_come_at_once"}

    def log_metrics(self, points: Any) -> None:
        if len(points) > 500:
            raise ValueError("too many")
        super().log_metrics(points)


class FiniteOnly(SoundFile):
    caught_by: ClassVar = {"test_a_value_that_is_not_finite_breaks_nothing"}

    def log_metrics(self, points: Any) -> None:
        json.dumps([point.value for point in points], allow_nan=False)
        super().log_metrics(points)


class TagsForEver(SoundFile):
    caught_by: ClassVar = {"test_tags_may_be_overwritten"}

    def set_tags(self, tags: Any) -> None:
        assert self.path is not None
        before = json.loads(self.path.read_text())["tags"]
        if any(before.get(name, value) != value for name, value in tags.items()):
            raise RuntimeError("tags are for ever")
        super().set_tags(tags)


class LooksInManyLines(SoundFile):
    caught_by: ClassVar = {"test_where_is_one_line"}

    def where(self) -> str:
        return "here\nand there"


class MangledNames(SoundFile):
    caught_by: ClassVar = {"test_what_was_sent_is_stored_under_its_name"}

    def log_metrics(self, points: Any) -> None:
        super().log_metrics([attrs.evolve(point, name=point.name.replace("/", "_")) for point in points])


# --------------------------------------------------------------------------- the plugin


def classes(kind: type[Any], root: type[Any] | None = None) -> list[type[Any]]:
    """Return every class of this module that is offered as that kind."""
    offered = [each for each in globals().values() if isinstance(each, type) and hasattr(each, "caught_by")]
    return [each for each in offered if issubclass(each, kind) or each is root]


@hookimpl
def wmtp_weighting_strategies() -> Any:
    return [
        component(cls, needs=cls.needs, negative_weights=getattr(cls, "negative_weights", False))
        for cls in classes(WeightingStrategy, OfNoKind)
    ]


@hookimpl
def wmtp_critics() -> Any:
    return [component(cls, provides=cls.provides) for cls in classes(Critic)]


@hookimpl
def wmtp_data_sources() -> Any:
    return [component(cls) for cls in classes(DataSource)]


@hookimpl
def wmtp_trackers() -> Any:
    return [component(cls) for cls in classes(Tracker)]


def every_class() -> list[type[Any]]:
    """Return every class of this module that is offered as some kind, and the one of no kind."""
    kinds = (WeightingStrategy, Critic, DataSource, Tracker)
    return [OfNoKind, *itertools.chain.from_iterable(classes(kind) for kind in kinds)]
