"""What core promises of every critic.

Shape letters: B batch rows, T positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

from weighted_mtp_core.api import Batch, BuildContext, Critic, Scores, Signal
from weighted_mtp_core.plugins.loading import AnyComponent, Kind
from weighted_mtp_core.testing import documents
from weighted_mtp_core.testing.component import ComponentSuite, carry_over, random_numbers_untouched
from weighted_mtp_core.testing.documents import APART, NO_RESPONSE, PACKED, PAIRS, Layout, trunk_states

Build = Callable[[], Critic]
_FIELDS = {Signal.VALUE: "value_BT", Signal.REFERENCE_LOSS: "reference_loss_BT"}
_STEPS = 40


def states(critic: Critic, batch: Batch) -> Tensor | None:
    """Return what core hands over as trunk states."""
    return trunk_states(batch) if critic.reads_policy else None


def score(critic: Critic, batch: Batch) -> Scores:
    """Score as core does."""
    with torch.no_grad():
        return critic.score(batch, states(critic, batch))


def filled(scores: Scores) -> dict[str, Tensor]:
    """Return the fields that are not None."""
    fields = {each.name: getattr(scores, each.name) for each in attrs.fields(Scores)}
    return {name: tensor for name, tensor in fields.items() if tensor is not None}


def own_parameters(critic: Critic) -> Iterator[nn.Parameter]:
    """Yield every parameter that the object holds, listed or not."""
    for value in vars(critic).values():
        if isinstance(value, nn.Parameter):
            yield value
        elif isinstance(value, nn.Module):
            yield from value.parameters()


class CriticSuite(ComponentSuite):
    """Checks of `score`, and of `loss` and `parameters` where the critic is trainable."""

    kind: ClassVar[Kind] = Kind.CRITIC

    @pytest.fixture
    def context(self, tmp_path: Path) -> BuildContext:
        """A context with a stand-in for the policy."""
        return BuildContext(seed=7, storage=tmp_path / "storage", model=documents.model_context())

    @pytest.fixture
    def critic(self, build: Build) -> Critic:
        """A critic that took a few steps if it is trainable, so that its scores say something."""
        critic = build()
        self._train(critic, steps=3)
        return critic

    @pytest.fixture
    def trainable(self, build: Build) -> Critic:
        """A fresh critic; tests of training do not apply to one that is never trained."""
        critic = build()
        if not critic.trainable:
            pytest.skip("the critic is not trainable")
        return critic

    # ------------------------------------------------------------------ scores

    def test_fills_exactly_what_it_provides(self, component: AnyComponent, critic: Critic) -> None:
        """Core matches the declaration with what the weighting needs, before anything is built."""
        provided = {_FIELDS[signal] for signal in component.provides}

        assert set(filled(score(critic, PACKED.batch()))) == provided

    def test_scores_are_one_finite_float32_a_token(self, critic: Critic) -> None:
        """Also on prompts and on padding."""
        batch = PACKED.batch()
        for name, tensor in filled(score(critic, batch)).items():
            assert tensor.shape == batch.ids_BT.shape, name
            assert tensor.dtype == torch.float32, name
            assert tensor.isfinite().all(), name

    def test_scores_carry_no_gradient(self, critic: Critic) -> None:
        """Even where the caller left gradients on."""
        batch = PACKED.batch()
        scores = filled(critic.score(batch, states(critic, batch)))

        assert [name for name, tensor in scores.items() if tensor.requires_grad] == []

    def test_a_score_knows_only_the_tokens_up_to_its_own(self, critic: Critic) -> None:
        """V_t is the value of the prefix that ends at token t; the loss of token t is predicted from it."""
        for cut in (3, 5, 8):
            batch, other = APART.batch(), APART.batch()
            later_BT = (torch.arange(batch.ids_BT.shape[1]) > cut) & (batch.document_BT >= 0)
            other_ids_BT = (other.ids_BT + 7 * later_BT) % documents.VOCAB_SIZE
            other = attrs.evolve(other, ids_BT=other_ids_BT)
            scores, changed = score(critic, batch), score(critic, other)
            for name, tensor in filled(scores).items():
                self._assert_alike(tensor[:, : cut + 1], getattr(changed, name)[:, : cut + 1])

    def test_scores_do_not_see_the_reward(self, critic: Critic) -> None:
        """The reward is what a value predicts."""
        batch = PACKED.batch()
        blind = attrs.evolve(batch, reward_BT=torch.zeros_like(batch.reward_BT))
        seen = score(critic, batch)
        for name, tensor in filled(score(critic, blind)).items():
            assert torch.equal(tensor, getattr(seen, name)), name

    def test_padding_has_no_say(self, critic: Critic) -> None:
        """More padding, and other leftovers on it, change no score."""
        wide = attrs.evolve(PACKED, padding=PACKED.padding + 5, filler=3)
        narrow_scores, wide_scores = score(critic, PACKED.batch()), score(critic, wide.batch())
        for name, tensor in filled(narrow_scores).items():
            for one, other in zip(PACKED.cut(tensor), wide.cut(getattr(wide_scores, name)), strict=True):
                self._assert_alike(one, other)

    def test_packing_has_no_say(self, critic: Critic) -> None:
        """Documents that share a row get the scores that they get in rows of their own."""
        packed, apart = score(critic, PACKED.batch()), score(critic, APART.batch())
        for name, tensor in filled(packed).items():
            for one, other in zip(PACKED.cut(tensor), APART.cut(getattr(apart, name)), strict=True):
                self._assert_alike(one, other)

    def test_scoring_again_gives_the_same_scores(self, critic: Critic) -> None:
        """No dropout, no hidden counter: a cache may stand in for a critic."""
        first = score(critic, PACKED.batch())
        for name, tensor in filled(score(critic, PACKED.batch())).items():
            assert torch.equal(tensor, getattr(first, name)), name

    def test_leaves_the_batch_as_it_is(self, critic: Critic) -> None:
        """The same tensors go on to the policy."""
        batch, untouched = self._training_batch(critic), self._training_batch(critic)
        score(critic, batch)
        if critic.trainable:
            critic.loss(batch, states(critic, batch))

        for each in attrs.fields(Batch):
            now, before = getattr(batch, each.name), getattr(untouched, each.name)
            assert torch.equal(now, before) if isinstance(now, Tensor) else now == before, each.name

    # ------------------------------------------------------------------ state

    def test_equal_seeds_build_equal_critics(self, build: Build) -> None:
        """Whatever the global generators did in between."""
        first = score(build(), PACKED.batch())
        torch.rand(3)
        for name, tensor in filled(score(build(), PACKED.batch())).items():
            assert torch.equal(tensor, getattr(first, name)), name

    def test_state_survives_a_checkpoint(self, build: Build, critic: Critic, tmp_path: Path) -> None:
        """A critic that was loaded scores as the one that was saved, bit for bit."""
        loaded = build()
        carry_over(critic, loaded, tmp_path / "checkpoint")
        saved = score(critic, PACKED.batch())
        for name, tensor in filled(score(loaded, PACKED.batch())).items():
            assert torch.equal(tensor, getattr(saved, name)), name

    # ------------------------------------------------------------------ training

    def test_asks_for_batches_that_core_makes(self, build: Build) -> None:
        """`"pointwise"` or `"pairs"`."""
        assert build().batching in {"pointwise", "pairs"}

    def test_only_a_trainable_critic_has_parameters(self, build: Build) -> None:
        """Stage 1 trains exactly these, and is left out if there are none."""
        critic = build()

        assert bool(list(critic.parameters())) == critic.trainable

    def test_the_loss_is_a_finite_float32_scalar(self, trainable: Critic) -> None:
        """With a gradient; its metrics are scalars without one."""
        batch = self._training_batch(trainable)
        result = trainable.loss(batch, states(trainable, batch))

        assert result.loss.shape == ()
        assert result.loss.dtype == torch.float32
        assert result.loss.isfinite()
        assert result.loss.requires_grad
        for name, value in result.metrics.items():
            assert torch.as_tensor(value).shape == (), name
            assert torch.as_tensor(value).isfinite(), name
            assert not torch.as_tensor(value).requires_grad, name

    def test_gradients_reach_the_trunk_nowhere(self, trainable: Critic) -> None:
        """The policy is not the critic's to train."""
        if not trainable.reads_policy:
            return
        batch = self._training_batch(trainable)
        hidden_BTH = trunk_states(batch).requires_grad_()
        trainable.loss(batch, hidden_BTH).loss.backward()  # type: ignore[no-untyped-call]

        assert hidden_BTH.grad is None

    def test_gradients_reach_every_listed_parameter_and_no_other(self, trainable: Critic) -> None:
        """What `parameters()` leaves out would never learn; what it lists in vain is a mistake too."""
        batch = self._training_batch(trainable)
        trainable.loss(batch, states(trainable, batch)).loss.backward()  # type: ignore[no-untyped-call]
        listed = list(trainable.parameters())
        others = [each for each in own_parameters(trainable) if all(each is not one for one in listed)]

        assert all(each.grad is not None for each in listed if each.requires_grad)
        assert all(each.grad is None for each in others)

    def test_training_on_one_batch_lowers_its_loss(self, trainable: Critic) -> None:
        """Forty steps of AdamW are enough to learn four responses by heart."""
        losses = self._train(trainable, steps=_STEPS)

        assert losses[-1] < losses[0]

    def test_a_batch_without_responses_gives_a_finite_loss(self, trainable: Critic) -> None:
        """There is nothing to learn from it."""
        batch = Layout(rows=[[NO_RESPONSE], [NO_RESPONSE]]).batch()
        result = trainable.loss(batch, states(trainable, batch))

        assert result.loss.isfinite()

    def test_training_leaves_global_random_numbers_alone(self, trainable: Critic) -> None:
        """Randomness comes from a generator seeded by `context.seed`."""
        with random_numbers_untouched():
            self._train(trainable, steps=1)

    # ------------------------------------------------------------------ helpers

    @staticmethod
    def _training_batch(critic: Critic) -> Batch:
        return PAIRS.batch() if critic.batching == "pairs" else PACKED.batch()

    @classmethod
    def _train(cls, critic: Critic, *, steps: int) -> list[float]:
        """Train on one batch and return the losses."""
        if not critic.trainable:
            return []
        optimiser = torch.optim.AdamW(critic.parameters(), lr=1e-2)
        losses = []
        for _ in range(steps):
            batch = cls._training_batch(critic)
            loss = critic.loss(batch, states(critic, batch)).loss
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    @staticmethod
    def _assert_alike(one: Tensor, other: Tensor) -> Any:
        """Equal but for the rounding of sums taken in another order."""
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
