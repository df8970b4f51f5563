"""The heads' shares of the loss (alpha). K heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def head_shares(head_weights: Sequence[float], n_future: int) -> Tensor:
    """Return `alpha_K`, float32, summing to 1; no weights mean equal shares."""
    weights = torch.tensor(head_weights or (1.0,) * n_future, dtype=torch.float32)
    return weights / weights.sum()
