"""The checks that every weighting must pass.

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
    """Checks the weights that a weighting returns, and its state."""

    kind: ClassVar[Kind] = Kind.WEIGHTING

    @pytest.fixture
    def needs(self, selected: SelectedComponent) -> Needs:
        """The signals that the component and the weightings inside it need."""
        return selected.needs

    @pytest.fixture
    def weights(self, build: Build, needs: Needs) -> Weights:
        """The weights of two rows with two documents each."""
        return build().weigh(PACKED.view(needs))

    def test_weights_have_a_shape_that_core_aligns(self, weights: Weights) -> None:
        """The shape is `[B, T]`, indexed by target token, or `[B, T, K]`, indexed by source and head."""
        target_BTK = PACKED.view(()).target_BTK

        assert tuple(weights.weight.shape) in {tuple(target_BTK.shape[:2]), tuple(target_BTK.shape)}

    def test_weights_are_float32(self, weights: Weights) -> None:
        """Losses, weights and sums are float32 for every dtype of the model."""
        assert weights.weight.dtype == torch.float32

    def test_weights_are_finite(self, weights: Weights) -> None:
        """A single NaN would make the loss NaN."""
        assert not weights.weight.isnan().any()
        assert not weights.weight.isinf().any()

    def test_weights_are_not_negative(self, selected: SelectedComponent, weights: Weights) -> None:
        """The component declares negative weights, because they increase cross-entropies without bound."""
        if selected.negative_weights:
            pytest.skip("the component declares negative weights")
        assert not (weights.weight < 0).any()

    def test_weights_are_zero_where_nothing_is_predicted(self, weights: Weights) -> None:
        """Prompts and padding have no target tokens."""
        view = PACKED.view(())
        mask = view.response_BT if weights.weight.ndim == 2 else view.target_BTK
        if weights.weight.shape != mask.shape:
            pytest.skip("the shape is wrong, which another check reports")

        assert not weights.weight[~mask].nan_to_num(nan=1.0).any()

    def test_weights_carry_no_gradient(self, weights: Weights) -> None:
        """The loss of the policy must not train the critic."""
        assert not weights.weight.requires_grad

    def test_metrics_are_finite_scalars(self, weights: Weights) -> None:
        """Each is a float or a 0-dim tensor, without gradient."""
        metrics = {name: torch.as_tensor(value) for name, value in weights.metrics.items()}

        assert [name for name, value in metrics.items() if value.ndim] == []
        assert [name for name, value in metrics.items() if value.requires_grad] == []
        assert _not_finite(weights) == []

    def test_leaves_the_view_as_it_is(self, build: Build, needs: Needs) -> None:
        """The loss uses the same tensors."""
        view = PACKED.view(needs)
        build().weigh(view)

        checks.assert_unchanged(view, PACKED.view(needs))

    def test_weighing_leaves_global_random_numbers_alone(self, build: Build, needs: Needs) -> None:
        """Random numbers come from a generator seeded by `context.seed`."""
        strategy, view = build(), PACKED.view(needs)
        with checks.random_numbers_untouched():
            strategy.weigh(view)

    def test_padding_changes_no_weight(self, build: Build, needs: Needs) -> None:
        """Neither the length of the padding nor the ids and values in it affect the weights."""
        wide = attrs.evolve(PACKED, padding=PACKED.padding + 5, filler=3)

        self._assert_close(
            PACKED.cut(build().weigh(PACKED.view(needs)).weight),
            wide.cut(build().weigh(wide.view(needs)).weight),
        )

    def test_packing_changes_no_weight(self, build: Build, needs: Needs) -> None:
        """Documents that share a row get the same weights as in separate rows."""
        self._assert_close(
            PACKED.cut(build().weigh(PACKED.view(needs)).weight),
            APART.cut(build().weigh(APART.view(needs)).weight),
        )

    def test_values_inside_the_prompt_change_no_weight(self, build: Build, needs: Needs) -> None:
        """The first value that may affect a weight is the value V_t of the last prompt token."""
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
        """In a run, undeclared signals are None, because core computes only the signals that are needed."""
        everything = build().weigh(PACKED.view(tuple(Signal)))

        self._assert_close([everything.weight], [build().weigh(PACKED.view(needs)).weight])

    def test_a_batch_without_responses_has_no_weights(self, build: Build, needs: Needs) -> None:
        """All weights are 0, and the next batch gets weights as usual."""
        strategy = build()
        weights = strategy.weigh(EMPTY.view(needs))
        after, as_usual = strategy.weigh(PACKED.view(needs)), build().weigh(PACKED.view(needs))

        assert not weights.weight.any()
        assert _not_finite(weights) == []
        assert torch.equal(after.weight.isfinite(), as_usual.weight.isfinite())

    def test_a_single_token_gets_a_weight(self, build: Build, needs: Needs) -> None:
        """A single response token without a prompt gets a weight, although its signals have no variance."""
        weights = build().weigh(SINGLE.view(needs))

        assert weights.weight.isfinite().all()
        assert _not_finite(weights) == []

    def test_equal_state_and_view_give_equal_weights(self, build: Build, needs: Needs) -> None:
        """Two new weightings give a sequence of batches bitwise the same weights."""
        assert self._steps(build(), needs) == self._steps(build(), needs)

    def test_state_survives_a_checkpoint(self, build: Build, needs: Needs, tmp_path: Path) -> None:
        """A resumed run computes the same weights as an uninterrupted run."""
        uninterrupted, resumed = build(), build()
        self._steps(uninterrupted, needs)
        checks.copy_state(uninterrupted, resumed, tmp_path / "checkpoint")

        assert self._steps(resumed, needs, first=2) == self._steps(uninterrupted, needs, first=2)

    def test_validation_changes_no_state(self, build: Build, needs: Needs) -> None:
        """Weighing with `training = False` does not affect later weights."""
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
