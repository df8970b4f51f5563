"""The weights that come with the data, unchanged.

Shape letters: B batch rows, T positions.
"""

from __future__ import annotations

from weighted_mtp_core.api import StepView, WeightingStrategy, Weights


class GivenWeights(WeightingStrategy):
    """Gives each response token the weight that the data give it."""

    def weigh(self, view: StepView) -> Weights:
        """Return weights `[B, T]`, indexed by the target token: the same for every head that predicts it."""
        assert view.given_BT is not None  # because the component needs `Signal.GIVEN`
        return Weights(weight=view.given_BT)
