"""Checks weight tensors: type, shape and dtype immediately, values later because they are on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import define, field
from torch import Tensor

from weighted_mtp_core.api import Weights
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.runtime.device import READ_EVERY

_ALL_ZERO, _NEGATIVE, _NOT_FINITE = 1, 2, 3  # ordered by severity: only the worst fault is kept


def check_weights(weights: object, response_BT: Tensor, *, n_future: int, label: str) -> None:
    """Refuse a weighting's result with a wrong type, shape or dtype; reads no values from the device.

    Args:
        weights: The weighting's result; its tensor is float32 `[B, T]` or `[B, T, K]`.
        response_BT: bool mask of the batch's response tokens.
        n_future: K, the number of heads.
        label: The weighting's address, plugin, distribution and version, for messages.

    Raises:
        RunFailedError: The weights have a wrong type, shape or dtype, or require a gradient.
    """
    if not isinstance(weights, Weights):
        raise RunFailedError(f"{label} returned a `{type(weights).__name__}`, expected `Weights`")
    weight = weights.weight
    if not isinstance(weight, Tensor):
        raise RunFailedError(f"{label} returned weights in a `{type(weight).__name__}`, expected a tensor")
    expected = tuple(response_BT.shape)
    if tuple(weight.shape) not in {expected, (*expected, n_future)}:
        fault = f"shape {tuple(weight.shape)}, expected {expected} or {(*expected, n_future)}"
    elif weight.dtype != torch.float32:
        fault = f"dtype {weight.dtype}, expected torch.float32"
    elif weight.requires_grad:
        fault = "a gradient; weights must be detached"
    else:
        return
    raise RunFailedError(f"{label} returned weights with {fault}")


@define(kw_only=True, eq=False)
class ValueCheck:
    """Refuses weights that are not finite, and negative weights that the recipe does not allow.

    A warning is logged once if all targets of a step have weight 0. On an accelerator, the results of the
    checks are read only every few steps, so invalid weights end the run a few steps late; until then, steps
    with a non-finite loss or gradient are skipped.

    Attributes:
        label: The weighting's address, plugin, distribution and version, for messages.
        negative: Whether weights may be negative.
        log: Receives the warning.
    """

    label: str
    negative: bool = False
    log: Callable[[str], None] = print
    _worst: Tensor | None = field(init=False, default=None)
    _warned: bool = field(init=False, default=False)

    def note(self, weight: Tensor, *, all_zero: Tensor | None = None) -> None:
        """Check a step's weights on the device; the result stays on the device until `raise_if_bad`.

        Args:
            weight: The weights, `[B, T]` or `[B, T, K]`.
            all_zero: Whether all targets of the step have weight 0, a bool scalar; None skips this check.
        """
        harmless = (
            torch.zeros((), dtype=torch.long, device=weight.device) if all_zero is None else all_zero.long()
        )
        bad = harmless if self.negative else torch.where((weight < 0).any(), _NEGATIVE, harmless)
        found = torch.where(torch.isfinite(weight).all(), bad, _NOT_FINITE)
        self._worst = found if self._worst is None else torch.maximum(self._worst, found)

    def due(self, step: int, steps: int) -> bool:
        """Return whether to call `raise_if_bad` after this step; on a CPU always, because reading is free.

        On an accelerator, the result is True every `READ_EVERY` steps, after the last step, and if no weights
        were checked since the last call of `raise_if_bad`.
        """
        on_host = self._worst is None or self._worst.device.type == "cpu"
        return on_host or (step + 1) % READ_EVERY == 0 or step + 1 >= steps

    def raise_if_bad(self) -> None:
        """Read the results of all checks since the last call; this waits for the device.

        Raises:
            RunFailedError: A weight was not finite, or was negative although `negative` is false.
        """
        worst = 0 if self._worst is None else int(self._worst)
        self._worst = None
        if worst == _ALL_ZERO and not self._warned:
            self._warned = True
            self.log(
                f"WARNING: {self.label} gave each target of a step the weight 0; the policy learns nothing "
                "from such a step"
            )
        if worst == _NOT_FINITE:
            raise RunFailedError(f"{self.label} returned weights with NaN or infinity in them")
        if worst == _NEGATIVE:
            raise RunFailedError(
                f"{self.label} returned weights with a negative weight in them",
                hint="that needs `negative_weights` in both the component and the recipe: "
                "`loss.negative_weights = true`",
            )
