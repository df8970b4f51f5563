"""What all of this plugin's weightings share: they keep the state of what they wrap.

Shape letters: B batch rows, T positions, K heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from weighted_mtp_core.api import StepView, WeightingStrategy, WmtpError


class Wrapper(WeightingStrategy):
    """Keeps the state of its parts, each key with the number of its part in front."""

    def __init__(self, parts: Sequence[WeightingStrategy]) -> None:
        self._parts = tuple(parts)

    def state_dict(self) -> dict[str, Any]:
        """Return the parts' states."""
        return {
            f"{i}.{key}": value
            for i, part in enumerate(self._parts)
            for key, value in part.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them.

        Raises:
            WmtpError: A part refuses its state, or there is state of no part.
        """
        of_parts: list[dict[str, Any]] = [{} for _ in self._parts]
        for name, value in state.items():
            number, _, key = name.partition(".")
            if not number.isdigit() or int(number) >= len(of_parts):
                raise WmtpError(f"`{name}` is state of none of the {len(of_parts)} wrapped weightings")
            of_parts[int(number)][key] = value
        for part, own in zip(self._parts, of_parts, strict=True):
            part.load_state_dict(own)


def counted(view: StepView, weight: Tensor) -> Tensor:
    """Return where weights of this shape, `[B, T]` or `[B, T, K]`, belong to something that is predicted."""
    return view.response_BT if weight.ndim == 2 else view.target_BTK
