"""Computes each head's share of the loss (alpha), which may follow a schedule; K is the number of heads."""

from __future__ import annotations

import torch
from torch import Tensor

from weighted_mtp_core.recipe.schema import LossTable


def loss_shares(table: LossTable, n_future: int, *, progress: float) -> Tensor:
    """Return each head's share `alpha_K`, float32, with sum 1.

    The share of head k is proportional to `head_weights[k - 1] * head_decay^(k - 1)` times the factor of the
    schedule; if `head_weights` is empty, 1 is used instead of `head_weights[k - 1]`. The factor is always 1
    for head 1 and for the schedule `constant`. All other schedules change factors in the first part of
    training, which consists of the fraction `head_schedule_end` of the steps. The schedules `forward` and
    `reverse` are the curricula of Aynetdinov and Akbik 2025: the first part of training is divided into K
    phases of equal length, and the last phase continues until the end of training. The schedule `forward`
    begins with head 1 and adds heads 2, 3, ... one by one; the schedule `reverse` begins with all heads and
    removes heads K, K - 1, ... until only head 1 is left. With `linear`, the factor of heads 2..K rises
    linearly from 0 to 1 during the first part; with `step`, the factor is 0 during the first part. After the
    first part, the factor is 1 with `linear` and with `step`.

    Args:
        table: The recipe's `[loss]`.
        n_future: K, the number of heads.
        progress: Completed fraction of the training steps, in [0, 1).
    """
    base_K = torch.tensor(table.head_weights or (1.0,) * n_future, dtype=torch.float64)
    decay_K = table.head_decay ** torch.arange(n_future, dtype=torch.float64)
    weight_K = base_K * decay_K * _presence(table, n_future, progress=progress)
    return (weight_K / weight_K.sum()).float()


def _presence(table: LossTable, n_future: int, *, progress: float) -> Tensor:
    """Return the schedule's factor for each head, float64 `[K]` in [0, 1]; the factor for head 1 is 1."""
    done = min(1.0, progress / table.head_schedule_end)
    phase = min(n_future, int(done * n_future) + 1)  # 1 to K
    number_K = torch.arange(1, n_future + 1)
    match table.head_schedule:
        case "constant":
            presence_K = torch.ones(n_future)
        case "linear":
            presence_K = torch.full((n_future,), done)
        case "step":
            presence_K = torch.full((n_future,), float(done == 1.0))
        case "forward":
            presence_K = number_K <= phase
        case "reverse":
            presence_K = number_K <= n_future + 1 - phase
    return torch.where(number_K == 1, 1.0, presence_K.double())
