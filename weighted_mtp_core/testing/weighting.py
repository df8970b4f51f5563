"""Define the checks that every weighting must pass.

Shape letters: B batch rows, T positions, K heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor

from weighted_mtp_core.api import Signal, WeightingStrategy, Weights
from weighted_mtp_core.plugins.loading import Kind
from weighted_mtp_core.plugins.selection import SelectedComponent
from weighted_mtp_core.testing import component as checks
from weighted_mtp_core.testing.documents import APART, EMPTY, OTHER, PACKED, SINGLE

Build = Callable[[], WeightingStrategy]
Needs = frozenset[Signal]


class WeightingStrategySuite(checks.ComponentSuite):
    """Checks the weights that a weighting returns, and the state that it saves."""

    kind: ClassVar[Kind] = Kind.WEIGHTING

    @pytest.fixture
    def needs(self, selected: SelectedComponent) -> Needs:
        """The signals that the weighting and the weightings that it wraps need."""
        return selected.needs

    @pytest.fixture
    def weights(self, build: Build, needs: Needs) -> Weights:
        """The weights of a batch of two rows with two documents each."""
        return build().weigh(PACKED.view(needs))

    def test_weights_have_a_shape_that_core_aligns(self, weights: Weights) -> None:
        """Weights must have shape `[B, T]`, indexed by target, or `[B, T, K]`, indexed by source and head."""
        target_BTK = PACKED.view(()).target_BTK

        assert tuple(weights.weight.shape) in {tuple(target_BTK.shape[:2]), tuple(target_BTK.shape)}

    def test_weights_are_float32(self, weights: Weights) -> None:
        """Weights must be float32 whatever the dtype of the model is."""
        assert weights.weight.dtype == torch.float32

    def test_weights_are_finite(self, weights: Weights) -> None:
        """Weights must be finite, because a single NaN or infinity would make the loss NaN or infinite."""
        assert not weights.weight.isnan().any()
        assert not weights.weight.isinf().any()

    def test_weights_are_not_negative(self, selected: SelectedComponent, weights: Weights) -> None:
        """Only a component that declares `negative_weights` may return negative weights."""
        if selected.negative_weights:
            pytest.skip("the component declares negative weights")
        assert not (weights.weight < 0).any()

    def test_weights_are_zero_where_nothing_is_predicted(self, weights: Weights) -> None:
        """Weights must be 0 outside responses (`[B, T]`), or where `target_BTK` is False (`[B, T, K]`)."""
        view = PACKED.view(())
        mask = view.response_BT if weights.weight.ndim == 2 else view.target_BTK
        if weights.weight.shape != mask.shape:
            pytest.skip("the shape is wrong, which another check reports")

        assert not weights.weight[~mask].nan_to_num(nan=1.0).any()

    def test_weights_carry_no_gradient(self, weights: Weights) -> None:
        """Weights must have no gradient, because the loss of the policy must not train the critic."""
        assert not weights.weight.requires_grad

    def test_metrics_are_finite_scalars(self, weights: Weights) -> None:
        """Each metric must be a finite float or 0-dim tensor, without gradient."""
        metrics = {name: torch.as_tensor(value) for name, value in weights.metrics.items()}

        assert [name for name, value in metrics.items() if value.ndim] == []
        assert [name for name, value in metrics.items() if value.requires_grad] == []
        assert _not_finite(weights) == []

    def test_leaves_the_view_as_it_is(self, build: Build, needs: Needs) -> None:
        """A weighting must not change the tensors of its view, because the loss uses the same tensors."""
        view = PACKED.view(needs)
        build().weigh(view)

        checks.assert_unchanged(view, PACKED.view(needs))

    def test_weighing_leaves_global_random_numbers_alone(self, build: Build, needs: Needs) -> None:
        """A weighting must draw random numbers from a generator of its own, seeded by `context.seed`."""
        strategy, view = build(), PACKED.view(needs)
        with checks.random_numbers_untouched():
            strategy.weigh(view)

    def test_padding_changes_no_weight(self, build: Build, needs: Needs) -> None:
        """Neither the length of the padding nor the ids and values on padding may affect the weights."""
        wide = attrs.evolve(PACKED, padding=PACKED.padding + 5, filler=3)

        self._assert_close(
            PACKED.cut(build().weigh(PACKED.view(needs)).weight),
            wide.cut(build().weigh(wide.view(needs)).weight),
        )

    def test_packing_changes_no_weight(self, build: Build, needs: Needs) -> None:
        """Documents that share a row must get the same weights as in separate rows."""
        self._assert_close(
            PACKED.cut(build().weigh(PACKED.view(needs)).weight),
            APART.cut(build().weigh(APART.view(needs)).weight),
        )

    def test_values_inside_the_prompt_change_no_weight(self, build: Build, needs: Needs) -> None:
        """Values of prompt tokens must not affect the weights, except the value of the last prompt token."""
        view = PACKED.view(needs)
        if view.value_BT is None and view.log_value_BT is None:
            return
        next_is_response_BT = torch.roll(view.response_BT, -1, dims=1)
        counts_BT = view.response_BT | next_is_response_BT | (view.document_BT < 0)
        changed = {
            name: value_BT.where(counts_BT, 40.0)
            for name in ("value_BT", "log_value_BT")
            if (value_BT := getattr(view, name)) is not None
        }
        other = attrs.evolve(view, **changed)

        self._assert_close([build().weigh(view).weight], [build().weigh(other).weight])

    def test_undeclared_signals_change_no_weight(self, build: Build, needs: Needs) -> None:
        """Signals that the component does not declare must not affect the weights; in a run they are None."""
        everything = build().weigh(PACKED.view(tuple(Signal)))

        self._assert_close([everything.weight], [build().weigh(PACKED.view(needs)).weight])

    def test_a_batch_without_responses_has_no_weights(self, build: Build, needs: Needs) -> None:
        """All weights of a batch without responses must be 0, and the next weights must stay finite."""
        strategy = build()
        weights = strategy.weigh(EMPTY.view(needs))
        after, as_usual = strategy.weigh(PACKED.view(needs)), build().weigh(PACKED.view(needs))

        assert not weights.weight.any()
        assert _not_finite(weights) == []
        assert torch.equal(after.weight.isfinite(), as_usual.weight.isfinite())

    def test_a_single_token_gets_a_weight(self, build: Build, needs: Needs) -> None:
        """A batch of one response token must get a finite weight, although its signals have no variance."""
        weights = build().weigh(SINGLE.view(needs))

        assert weights.weight.isfinite().all()
        assert _not_finite(weights) == []

    def test_equal_state_and_view_give_equal_weights(self, build: Build, needs: Needs) -> None:
        """Two new weighting objects must give bitwise the same weights for the same sequence of batches."""
        assert self._steps(build(), needs) == self._steps(build(), needs)

    def test_state_survives_a_checkpoint(self, build: Build, needs: Needs, tmp_path: Path) -> None:
        """A weighting restored from a checkpoint must give the same weights as the original weighting."""
        uninterrupted, resumed = build(), build()
        self._steps(uninterrupted, needs)
        checks.copy_state(uninterrupted, resumed, tmp_path / "checkpoint")

        assert self._steps(resumed, needs, first=2) == self._steps(uninterrupted, needs, first=2)

    def test_validation_changes_no_state(self, build: Build, needs: Needs) -> None:
        """A call of `weigh` with `training = False` must not affect later weights."""
        strategy, never_validated = build(), build()
        for each in (strategy, never_validated):
            each.weigh(PACKED.view(needs))
        never_validated.load_state_dict(copy.deepcopy(strategy.state_dict()))
        for layout in (APART, OTHER):
            strategy.weigh(layout.view(needs, step=1, training=False))

        assert self._steps(strategy, needs, first=1) == self._steps(never_validated, needs, first=1)

    @staticmethod
    def _steps(strategy: WeightingStrategy, needs: Needs, *, first: int = 0) -> list[bytes]:
        """Return the weights of two different batches as bytes, so that NaN compares equal to NaN."""
        return [
            strategy.weigh(layout.view(needs, step=first + i)).weight.detach().float().numpy().tobytes()
            for i, layout in enumerate((PACKED, OTHER))
        ]

    @staticmethod
    def _assert_close(left: Iterable[Tensor], right: Iterable[Tensor]) -> None:
        """Assert equality up to the rounding errors of sums in a different order."""
        for one, other in zip(left, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)


def _not_finite(weights: Weights) -> list[str]:
    """Return the names of the metrics that are not finite."""
    return [name for name, value in weights.metrics.items() if not torch.as_tensor(value).isfinite().all()]
