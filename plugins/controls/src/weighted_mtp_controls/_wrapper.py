"""Base class of weightings that wrap other weightings.

Shape letters: B batch rows, T positions, K heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from weighted_mtp_core.api import StepView, WeightingStrategy, WmtpError


class Wrapper(WeightingStrategy):
    """Saves and restores the states of the wrapped weightings.

    In the saved state, each key begins with the number of its weighting, counted from 0, and a dot.
    """

    def __init__(self, wrapped: Sequence[WeightingStrategy]) -> None:
        self._wrapped = tuple(wrapped)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the wrapped weightings."""
        return {
            f"{i}.{key}": value
            for i, weighting in enumerate(self._wrapped)
            for key, value in weighting.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the states of the wrapped weightings.

        Raises:
            WmtpError: A wrapped weighting refuses its state, or a key belongs to none of the weightings.
        """
        states: list[dict[str, Any]] = [{} for _ in self._wrapped]
        for name, value in state.items():
            number, _, key = name.partition(".")
            if not number.isdigit() or int(number) >= len(states):
                raise WmtpError(f"`{name}` is state of none of the {len(states)} wrapped weightings")
            states[int(number)][key] = value
        for weighting, own in zip(self._wrapped, states, strict=True):
            weighting.load_state_dict(own)


def target_mask(view: StepView, weight: Tensor) -> Tensor:
    """Return the mask of targets, bool, in the shape of `weight`: `[B, T]` or `[B, T, K]`."""
    return view.response_BT if weight.ndim == 2 else view.target_BTK
