"""Define the checks that every critic must pass.

Shape letters: B batch rows, T positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

from weighted_mtp_core.api import Batch, Critic, CriticLoss, Scores
from weighted_mtp_core.api.tensors import CRITIC_SIGNALS
from weighted_mtp_core.plugins.loading import AnyComponent, Kind
from weighted_mtp_core.testing import component as checks
from weighted_mtp_core.testing.documents import APART, EMPTY, PACKED, PAIRS, VOCAB_SIZE, Layout, trunk_states

Build = Callable[[], Critic]
_FIELDS = {signal: f"{signal.value}_BT" for signal in CRITIC_SIGNALS}
_STEPS = 40


def _filled(scores: Scores) -> dict[str, Tensor]:
    """Return the fields of `scores` that are not None, keyed by name."""
    return {name: value for name, value in attrs.asdict(scores, recurse=False).items() if value is not None}


@torch.no_grad()
def _score(critic: Critic, batch: Batch) -> dict[str, Tensor]:
    return _filled(critic.score(batch, _states(critic, batch)))


def _states(critic: Critic, batch: Batch) -> Tensor | None:
    return trunk_states(batch) if critic.reads_policy else None


def _loss(critic: Critic, batch: Batch | None = None) -> CriticLoss:
    batch = _training_batch(critic) if batch is None else batch
    return critic.loss(batch, _states(critic, batch))


def _training_batch(critic: Critic) -> Batch:
    return PAIRS.batch() if critic.batching == "pairs" else PACKED.batch()


def _train(critic: Critic, *, steps: int) -> list[float]:
    """Train a critic on one batch and return the loss of each step."""
    optimiser = torch.optim.AdamW(critic.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = _loss(critic).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _own_parameters(critic: Critic) -> Iterator[nn.Parameter]:
    """Yield every parameter among the critic's attributes, even if `parameters` does not return it."""
    for value in vars(critic).values():
        if isinstance(value, nn.Parameter):
            yield value
        elif isinstance(value, nn.Module):
            yield from value.parameters()


def _assert_equal(scores: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    for name, tensor in scores.items():
        assert torch.equal(tensor, others[name]), name


class CriticSuite(checks.ComponentSuite):
    """Checks the scores and the state of a critic and, if it is trainable, `loss` and `parameters`."""

    kind: ClassVar[Kind] = Kind.CRITIC

    @pytest.fixture
    def critic(self, build: Build) -> Critic:
        """A critic; if it is trainable, it is trained for 3 steps, so that not all scores are equal."""
        critic = build()
        if critic.trainable:
            _train(critic, steps=3)
        return critic

    @pytest.fixture
    def trainable(self, build: Build) -> Critic:
        """A new critic; the test is skipped if the critic is not trainable."""
        critic = build()
        if not critic.trainable:
            pytest.skip("the critic is not trainable")
        return critic

    def test_fills_exactly_what_it_provides(self, component: AnyComponent, critic: Critic) -> None:
        """A critic must fill the fields of its declared signals, on which weightings rely, and no others."""
        assert set(_score(critic, PACKED.batch())) == {_FIELDS[signal] for signal in component.provides}

    def test_scores_are_one_finite_float32_a_token(self, critic: Critic) -> None:
        """Each token, even in prompts and padding, must get one finite float32 score per declared signal."""
        batch = PACKED.batch()
        for name, tensor in _score(critic, batch).items():
            assert tensor.shape == batch.ids_BT.shape, name
            assert tensor.dtype == torch.float32, name
            assert tensor.isfinite().all(), name

    def test_autocast_changes_neither_dtypes_nor_what_is_trained(self, critic: Critic) -> None:
        """Autocast must change neither the dtypes of scores, loss and gradients nor which gradients exist.

        For example, successive tokens would often get equal scores in bfloat16.
        """
        plain = self._dtypes(critic)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert self._dtypes(critic) == plain

    def test_scores_carry_no_gradient(self, critic: Critic) -> None:
        """Scores must have no gradient, even if the caller has enabled gradients."""
        batch = PACKED.batch()
        scores = _filled(critic.score(batch, _states(critic, batch)))

        assert [name for name, tensor in scores.items() if tensor.requires_grad] == []

    def test_a_score_depends_only_on_the_tokens_up_to_its_own(self, critic: Critic) -> None:
        """The score of a token t, a value or a loss, must depend only on the prefix that ends at t."""
        batch = APART.batch()
        for cut in (3, 5, 8):
            later_BT = (torch.arange(batch.ids_BT.shape[1]) > cut) & (batch.document_BT >= 0)
            other = attrs.evolve(batch, ids_BT=(batch.ids_BT + 7 * later_BT) % VOCAB_SIZE)
            scores, changed = _score(critic, batch), _score(critic, other)
            for name, tensor in scores.items():
                self._assert_close(tensor[:, : cut + 1], changed[name][:, : cut + 1])

    def test_scores_do_not_depend_on_the_reward(self, critic: Critic) -> None:
        """A value predicts the reward, so a critic must not read the reward when it scores."""
        batch = PACKED.batch()
        no_reward = attrs.evolve(batch, reward_BT=torch.zeros_like(batch.reward_BT))

        _assert_equal(_score(critic, batch), _score(critic, no_reward))

    def test_padding_changes_no_score(self, critic: Critic) -> None:
        """Neither the length of the padding nor the token ids on padding may affect the scores."""
        self._assert_same_documents(
            critic, PACKED, attrs.evolve(PACKED, padding=PACKED.padding + 5, filler=3)
        )

    def test_packing_changes_no_score(self, critic: Critic) -> None:
        """Documents that share a row must get the same scores as in separate rows."""
        self._assert_same_documents(critic, PACKED, APART)

    def test_scoring_again_gives_the_same_scores(self, critic: Critic) -> None:
        """Scoring must use neither dropout nor a hidden counter, because core may cache the scores."""
        _assert_equal(_score(critic, PACKED.batch()), _score(critic, PACKED.batch()))

    def test_leaves_the_batch_as_it_is(self, critic: Critic) -> None:
        """A critic must not change the tensors of a batch, because the policy uses the same tensors."""
        batch = _training_batch(critic)
        _score(critic, batch)
        if critic.trainable:
            _loss(critic, batch)

        checks.assert_unchanged(batch, _training_batch(critic))

    def test_equal_seeds_build_equal_critics(self, build: Build) -> None:
        """Global random generators must not affect how a critic is initialised."""
        first = _score(build(), PACKED.batch())
        torch.rand(3)

        _assert_equal(first, _score(build(), PACKED.batch()))

    def test_state_survives_a_checkpoint(self, build: Build, critic: Critic, tmp_path: Path) -> None:
        """A critic loaded from a checkpoint must give bitwise the same scores as the saved critic."""
        loaded = build()
        checks.copy_state(critic, loaded, tmp_path / "checkpoint")

        _assert_equal(_score(critic, PACKED.batch()), _score(loaded, PACKED.batch()))

    def test_batching_is_a_known_one(self, build: Build) -> None:
        """The attribute `batching` of a critic must be `"pointwise"` or `"pairs"`."""
        assert build().batching in {"pointwise", "pairs"}

    def test_only_a_trainable_critic_has_parameters(self, build: Build) -> None:
        """A critic must have parameters if and only if it is trainable."""
        critic = build()

        assert bool(list(critic.parameters())) == critic.trainable

    def test_the_loss_is_a_finite_float32_scalar(self, trainable: Critic) -> None:
        """The loss must have a gradient, and the metrics must be finite scalars without gradient."""
        result = _loss(trainable)

        assert result.loss.shape == ()
        assert result.loss.dtype == torch.float32
        assert result.loss.isfinite()
        assert result.loss.requires_grad
        for name, value in result.metrics.items():
            assert torch.as_tensor(value).shape == (), name
            assert torch.as_tensor(value).isfinite(), name
            assert not torch.as_tensor(value).requires_grad, name

    def test_gradients_do_not_reach_the_trunk(self, trainable: Critic) -> None:
        """The loss must have no gradient with respect to trunk states, or a critic could train the policy."""
        if not trainable.reads_policy:
            return
        batch = _training_batch(trainable)
        hidden_BTH = trunk_states(batch).requires_grad_()
        trainable.loss(batch, hidden_BTH).loss.backward()  # type: ignore[no-untyped-call]

        assert hidden_BTH.grad is None

    def test_gradients_reach_every_listed_parameter_and_no_other(self, trainable: Critic) -> None:
        """Each trainable parameter that `parameters` returns must get a gradient; no other parameter may."""
        _loss(trainable).loss.backward()  # type: ignore[no-untyped-call]
        listed = list(trainable.parameters())
        others = [each for each in _own_parameters(trainable) if all(each is not one for one in listed)]

        assert all(each.grad is not None for each in listed if each.requires_grad)
        assert all(each.grad is None for each in others)

    def test_training_on_one_batch_lowers_its_loss(self, trainable: Critic) -> None:
        """Forty steps of AdamW on one batch of four responses must lower the loss of this batch."""
        losses = _train(trainable, steps=_STEPS)

        assert losses[-1] < losses[0]

    def test_a_batch_without_responses_gives_a_finite_loss(self, trainable: Critic) -> None:
        """A batch without target tokens must have a finite loss."""
        assert _loss(trainable, EMPTY.batch()).loss.isfinite()

    def test_training_leaves_global_random_numbers_alone(self, trainable: Critic) -> None:
        """A critic must draw random numbers from a generator of its own, seeded by `context.seed`."""
        with checks.random_numbers_untouched():
            _train(trainable, steps=1)

    @staticmethod
    def _dtypes(critic: Critic) -> list[torch.dtype | None]:
        """Return the dtypes of the scores, the loss and the gradients; None stands for a missing gradient."""
        found: list[torch.dtype | None] = [each.dtype for each in _score(critic, PACKED.batch()).values()]
        if critic.trainable:
            loss = _loss(critic).loss
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = [each.grad for each in critic.parameters()]
            found += [loss.dtype, *(None if each is None else each.dtype for each in gradients)]
            for each in critic.parameters():
                each.grad = None
        return found

    @classmethod
    def _assert_same_documents(cls, critic: Critic, layout: Layout, other: Layout) -> None:
        scores, others = _score(critic, layout.batch()), _score(critic, other.batch())
        for name, tensor in scores.items():
            for one, two in zip(layout.cut(tensor), other.cut(others[name]), strict=True):
                cls._assert_close(one, two)

    @staticmethod
    def _assert_close(one: Tensor, other: Tensor) -> None:
        """Assert equality up to the rounding errors of sums in a different order."""
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
