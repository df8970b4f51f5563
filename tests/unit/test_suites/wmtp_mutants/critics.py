"""Correct critics, and mutants for the checks that only critics must pass."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import attrs
from weighted_mtp_core.api import Critic, CriticLoss, Scores, Signal, WmtpError


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
