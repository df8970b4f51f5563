"""The weighting `given.weights`, which returns the weights in the data unchanged.

Shape letters: B batch rows, T positions.
"""

from __future__ import annotations

from weighted_mtp_core.api import StepView, WeightingStrategy, Weights


class GivenWeights(WeightingStrategy):
    """Gives each response token its weight in the data."""

    def weigh(self, view: StepView) -> Weights:
        """Return one weight per target token, float32 `[B, T]`; every head uses the same weights."""
        assert view.given_BT is not None  # because the component needs `Signal.GIVEN`
        return Weights(weight=view.given_BT)
