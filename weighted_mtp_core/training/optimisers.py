"""AdamW, its learning-rate schedule, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weighted_mtp_core.recipe.schema import TrainTable
from weighted_mtp_core.runtime.sharding import whole


def learning_rate(table: TrainTable, step: int) -> float:
    """Return the learning rate of a step (0-based): linear warm-up, then cosine decay to the final share.

    The cosine decay follows SGDR (Loshchilov and Hutter 2017, eq. 5) with one period.
    """
    if step < table.warmup_steps:
        return table.learning_rate * (step + 1) / table.warmup_steps
    span = max(1, table.steps - table.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * (step - table.warmup_steps) / span))
    return table.learning_rate * (table.final_learning_rate + (1 - table.final_learning_rate) * share)


def make_optimiser(
    parameters: Iterable[nn.Parameter],
    table: TrainTable,
    *,
    rates: Mapping[nn.Parameter, float] = MappingProxyType({}),
) -> torch.optim.AdamW:
    """Return AdamW for the parameters that require a gradient; weight decay applies only to matrices.

    Norms and biases are not decayed, because their scale needs no bound.

    Args:
        parameters: The parameters.
        table: The options.
        rates: Learning rates of some parameters, relative to the learning rate of the step; 1 for all others.
            `set_learning_rate` applies these factors.
    """
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:  # the fused kernel does not accept sharded and whole parameters together
            key = parameter.ndim >= 2, isinstance(parameter, DTensor), rates.get(parameter, 1.0)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": table.weight_decay if is_matrix else 0.0, "rate": rate}
            for (is_matrix, _, rate), members in sorted(groups.items(), reverse=True)
        ],
        lr=table.learning_rate,
        betas=(0.9, 0.95),
        fused=True,  # the fused kernel can skip a step on the device, see NonfiniteSteps
    )


def set_learning_rate(optimiser: torch.optim.Optimizer, table: TrainTable, step: int) -> None:
    """Set the learning rates of a step (0-based)."""
    for group in optimiser.param_groups:
        group["lr"] = group["rate"] * learning_rate(table, step)


def clip_gradients(
    parameters: Sequence[nn.Parameter], max_norm: float, *, size: Tensor | float = 1.0
) -> Tensor:
    """Scale gradients down to a total norm of at most `max_norm * sqrt(size)`; return the norm before that.

    With the same limit for all steps, steps with many tokens would be clipped most, so that tokens of short
    documents would again count more. Most of a gradient is noise, and the norm of a sum of n noisy terms
    grows as sqrt(n). The norms of sharded and of whole parameters are computed apart, because the two cannot
    be stacked.

    Args:
        parameters: Their gradients are scaled.
        max_norm: The limit for a step of average size.
        size: `StepResult.size`.
    """
    sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    others = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    norms = [
        whole(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]))
        for kind in (sharded, others)
        if kind
    ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    for kind in (sharded, others):
        nn.utils.clip_grads_with_norm_(kind, max_norm, norm / size**0.5)
    return norm
