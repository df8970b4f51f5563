"""Convert between tensors indexed by target token and tensors indexed by (source, head).

Shape letters: B rows, T positions, K heads.
"""

from __future__ import annotations

import torch
from torch import Tensor


def align_weights(weight: Tensor, target_BTK: Tensor) -> Tensor:
    """Return weights `[B, T, K]` indexed by (source, head), 0 where the pair does not count.

    Args:
        weight: `[B, T]`, indexed by the target token, or `[B, T, K]`, already indexed by (source, head).
        target_BTK: bool, True for the pairs that count.
    """
    if weight.ndim == 3:
        return torch.where(target_BTK, weight, 0.0)
    weight_BTK = weight.new_zeros(target_BTK.shape)
    for k in range(1, min(target_BTK.shape[2], weight.shape[1] - 1) + 1):
        weight_BTK[:, :-k, k - 1] = weight[:, k:]
    return torch.where(target_BTK, weight_BTK, 0.0)


def gather_by_target(x_BTK: Tensor, target_BTK: Tensor) -> Tensor:
    """Return the numbers of pairs indexed by (target, head), `[B, T, K]`, 0 where the pair does not count.

    Args:
        x_BTK: Numbers indexed by (source, head).
        target_BTK: bool, True for the pairs that count.
    """
    counted_BTK = torch.where(target_BTK, x_BTK, 0.0)
    by_target_BTK = torch.zeros_like(counted_BTK)
    for k in range(1, min(target_BTK.shape[2], x_BTK.shape[1] - 1) + 1):
        by_target_BTK[:, k:, k - 1] = counted_BTK[:, :-k, k - 1]
    return by_target_BTK
