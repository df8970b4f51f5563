"""The divisor of the loss in stage 2, chosen so that targets of equal weight count the same in all batches.

Unless documents are packed, a batch holds documents of similar length. If the loss of each batch were divided
by the batch's own sum of weights, all batches would count the same, so a token in a batch of short documents
would count more.

Shape letters: B rows, T positions, K heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from attrs import define, field
from torch import Tensor


@define(eq=False)
class Normaliser:
    """Computes the divisor of each head's loss in a step: the sum of |weight| that a step has on average.

    The divisor of a head is the number of its counted (position, head) pairs in an average step, which is
    computed before training, times the mean |weight| of its pairs up to and including the current step. If
    the mean |weight| were taken from the first step alone, a few tiny weights in that step could make the
    gradients of all later steps huge.

    Attributes:
        pairs_K: Number of counted (position, head) pairs of each head in a step, averaged over the steps of
            an epoch, or 1 for a head without pairs; float32, on the device.
        normalise: With `"weights"`, the divisor is as described above; with `"tokens"`, it is only the number
            of pairs.
    """

    pairs_K: Tensor
    normalise: Literal["weights", "tokens"]
    _weights_K: Tensor = field(init=False)
    _counts_K: Tensor = field(init=False)

    @classmethod
    def make(
        cls, pairs: Sequence[float], normalise: Literal["weights", "tokens"], *, device: torch.device
    ) -> Normaliser:
        """Return the normaliser of a run before its first step."""
        return cls(
            torch.tensor([each or 1.0 for each in pairs], dtype=torch.float32, device=device), normalise
        )

    def __attrs_post_init__(self) -> None:
        self._weights_K, self._counts_K = torch.zeros(2, *self.pairs_K.shape, device=self.pairs_K.device)

    def add(self, weight_BTK: Tensor, target_BTK: Tensor) -> Tensor:
        """Add a global batch to the mean |weight| and return the divisors, float32 `[K]`.

        With `normalise = "weights"`, the divisor of a head is 1 if all its weights so far are 0.
        """
        self._counts_K += target_BTK.sum(dim=(0, 1), dtype=torch.float32)
        self._weights_K += weight_BTK.abs().sum(dim=(0, 1), dtype=torch.float32)
        if self.normalise == "tokens":
            return self.pairs_K
        total_K = self.pairs_K * (self._weights_K / self._counts_K)
        return torch.where(self._weights_K > 0, total_K, 1.0)

    def size(self, count_K: Tensor) -> Tensor:
        """Return the size of a step with `count_K` pairs of each head, see `StepResult.size`."""
        return (count_K / self.pairs_K).mean().clamp(min=1e-3)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums of |weight| and of pairs so far."""
        return {"weights": self._weights_K, "counts": self._counts_K}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        self._weights_K.copy_(state["weights"])
        self._counts_K.copy_(state["counts"])
