"""What core promises of every weighting strategy.

Shape letters: B batch rows, T positions, K heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor

from weighted_mtp_core.api import BuildContext, Signal, StepView, WeightingStrategy, Weights
from weighted_mtp_core.plugins.loading import Kind
from weighted_mtp_core.plugins.selection import SelectedComponent
from weighted_mtp_core.testing import documents
from weighted_mtp_core.testing.component import ComponentSuite, carry_over, random_numbers_untouched
from weighted_mtp_core.testing.documents import APART, NO_RESPONSE, PACKED, SINGLE_TOKEN, Layout

Build = Callable[[], WeightingStrategy]


class WeightingStrategySuite(ComponentSuite):
    """Checks of `weigh` and of the state behind it."""

    kind: ClassVar[Kind] = Kind.WEIGHTING

    @pytest.fixture
    def context(self, tmp_path: Path) -> BuildContext:
        """A context with a stand-in for the policy."""
        return BuildContext(seed=7, storage=tmp_path / "storage", model=documents.model_context())

    @pytest.fixture
    def needs(self, chosen: SelectedComponent) -> frozenset[Signal]:
        """The signals that the component and what it wraps declared."""
        return chosen.needs

    @pytest.fixture
    def weights(self, build: Build, needs: frozenset[Signal]) -> Weights:
        """The weights of two rows with two documents each."""
        return build().weigh(PACKED.view(needs))

    # ------------------------------------------------------------------ one batch

    def test_weights_have_a_shape_that_core_aligns(self, weights: Weights) -> None:
        """`[B, T]`, indexed by the target token, or `[B, T, K]`, indexed by source and head."""
        target_BTK = PACKED.view(()).target_BTK

        assert tuple(weights.weight.shape) in {tuple(target_BTK.shape[:2]), tuple(target_BTK.shape)}

    def test_weights_are_float32(self, weights: Weights) -> None:
        """Losses, weights and sums are float32, whatever the model computes in."""
        assert weights.weight.dtype == torch.float32

    def test_weights_are_finite(self, weights: Weights) -> None:
        """One NaN ends a training."""
        assert not weights.weight.isnan().any()
        assert not weights.weight.isinf().any()

    def test_weights_are_not_negative(self, weights: Weights) -> None:
        """A negative weight would push the loss without bound."""
        assert not (weights.weight < 0).any()

    def test_weights_are_zero_where_nothing_is_predicted(self, weights: Weights) -> None:
        """Prompt tokens and padding are no targets."""
        view = PACKED.view(())
        mask = view.response_BT if weights.weight.ndim == 2 else view.target_BTK
        if weights.weight.shape != mask.shape:
            pytest.skip("the shape is wrong, which another check says")

        assert not weights.weight[~mask].nan_to_num(nan=1.0).any()

    def test_weights_carry_no_gradient(self, weights: Weights) -> None:
        """A weighting is no way around the critic's own loss."""
        assert not weights.weight.requires_grad

    def test_metrics_are_finite_scalars(self, weights: Weights) -> None:
        """Each is a float or a 0-dim tensor, without gradient."""
        values = {
            name: value if isinstance(value, Tensor) else torch.tensor(float(value))
            for name, value in weights.metrics.items()
        }

        assert [name for name, value in values.items() if value.ndim] == []
        assert [name for name, value in values.items() if value.requires_grad] == []
        assert [name for name, value in values.items() if not value.isfinite().all()] == []

    def test_leaves_the_view_as_it_is(self, build: Build, needs: frozenset[Signal]) -> None:
        """The same tensors go into the loss."""
        view, untouched = PACKED.view(needs), PACKED.view(needs)
        build().weigh(view)

        for each in attrs.fields(StepView):
            now, before = getattr(view, each.name), getattr(untouched, each.name)
            assert torch.equal(now, before) if isinstance(now, Tensor) else now == before, each.name

    def test_weighing_leaves_global_random_numbers_alone(
        self, build: Build, needs: frozenset[Signal]
    ) -> None:
        """Randomness comes from a generator seeded by `context.seed`."""
        strategy, view = build(), PACKED.view(needs)
        with random_numbers_untouched():
            strategy.weigh(view)

    # ------------------------------------------------------------------ what must not matter

    def test_padding_has_no_say(self, build: Build, needs: frozenset[Signal]) -> None:
        """More padding, and other leftovers on it, change no weight."""
        wide = attrs.evolve(PACKED, padding=PACKED.padding + 5, filler=3)

        self._assert_alike(
            PACKED.cut(build().weigh(PACKED.view(needs)).weight),
            wide.cut(build().weigh(wide.view(needs)).weight),
        )

    def test_values_inside_the_prompt_have_no_say(self, build: Build, needs: frozenset[Signal]) -> None:
        """Only V after the last prompt token counts: it is the value before the first response token."""
        view = PACKED.view(needs)
        if view.value_BT is None:
            return
        next_is_response_BT = torch.roll(view.response_BT, -1, dims=1)
        counts_BT = view.response_BT | next_is_response_BT | (view.document_BT < 0)
        other = attrs.evolve(view, value_BT=view.value_BT.where(counts_BT, 40.0))

        self._assert_alike([build().weigh(view).weight], [build().weigh(other).weight])

    def test_signals_that_were_not_declared_have_no_say(self, build: Build, needs: frozenset[Signal]) -> None:
        """In a run they are None, because core computes nothing that nobody asked for."""
        everything = build().weigh(PACKED.view(tuple(Signal)))
        declared = build().weigh(PACKED.view(needs))

        self._assert_alike([everything.weight], [declared.weight])

    def test_packing_has_no_say(self, build: Build, needs: frozenset[Signal]) -> None:
        """Documents that share a row get the weights that they get in rows of their own."""
        self._assert_alike(
            PACKED.cut(build().weigh(PACKED.view(needs)).weight),
            APART.cut(build().weigh(APART.view(needs)).weight),
        )

    def test_a_batch_without_responses_weighs_nothing(self, build: Build, needs: frozenset[Signal]) -> None:
        """All weights are 0, and the next batch is weighed as ever."""
        empty = Layout(rows=[[NO_RESPONSE], [NO_RESPONSE]])
        strategy, fresh = build(), build()
        weights = strategy.weigh(empty.view(needs))
        after, as_ever = strategy.weigh(PACKED.view(needs)), fresh.weigh(PACKED.view(needs))

        assert not weights.weight.any()
        assert [n for n, v in weights.metrics.items() if not torch.as_tensor(v).isfinite().all()] == []
        assert torch.equal(after.weight.isfinite(), as_ever.weight.isfinite())

    def test_a_single_token_is_weighed(self, build: Build, needs: frozenset[Signal]) -> None:
        """One response token has no spread, no neighbour and no prompt."""
        single = Layout(rows=[[SINGLE_TOKEN]], padding=0)
        weights = build().weigh(single.view(needs))

        assert weights.weight.isfinite().all()
        assert [n for n, v in weights.metrics.items() if not torch.as_tensor(v).isfinite().all()] == []

    # ------------------------------------------------------------------ state

    def test_equal_state_and_view_give_equal_weights(self, build: Build, needs: frozenset[Signal]) -> None:
        """Two fresh objects weigh a sequence of batches alike, bit for bit."""
        assert self._steps(build(), needs) == self._steps(build(), needs)

    def test_state_survives_a_checkpoint(
        self, build: Build, needs: frozenset[Signal], tmp_path: Path
    ) -> None:
        """A run that was interrupted goes on as if it had not been."""
        going_on = build()
        self._steps(going_on, needs)
        resumed = build()
        carry_over(going_on, resumed, tmp_path / "checkpoint")

        assert self._steps(resumed, needs, first=2) == self._steps(going_on, needs, first=2)

    def test_validation_moves_no_state(self, build: Build, needs: frozenset[Signal]) -> None:
        """Weighing with `training = False` leaves no trace in later weights."""
        strategy, never_validated = build(), build()
        for each in (strategy, never_validated):
            each.weigh(PACKED.view(needs))
        never_validated.load_state_dict(copy.deepcopy(strategy.state_dict()))
        strategy.weigh(APART.view(needs, step=1, training=False))
        strategy.weigh(Layout(rows=[[documents.FIRST]]).view(needs, step=1, training=False))

        assert self._steps(strategy, needs, first=1) == self._steps(never_validated, needs, first=1)

    # ------------------------------------------------------------------ helpers

    @staticmethod
    def _steps(strategy: WeightingStrategy, needs: frozenset[Signal], *, first: int = 0) -> list[bytes]:
        """Return the weights of two different batches in a row, as bits: a NaN too equals itself."""
        return [
            strategy.weigh(layout.view(needs, step=first + i)).weight.detach().float().numpy().tobytes()
            for i, layout in enumerate((PACKED, Layout(rows=[[documents.FIRST], [documents.FOURTH]])))
        ]

    @staticmethod
    def _assert_alike(left: Sequence[Tensor] | Any, right: Sequence[Tensor] | Any) -> None:
        """Equal but for the rounding of sums taken in another order."""
        for one, other in zip(left, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
