"""The optimisers of a stage, the learning rates of the model's parts, and gradient clipping."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.util import find_spec
from types import MappingProxyType

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.recipe.schema import Recipe
from weighted_mtp_core.recipe.train_table import TrainTable
from weighted_mtp_core.runtime.device import device_type
from weighted_mtp_core.runtime.sharding import whole
from weighted_mtp_core.training.eight_bit import EightBitAdamW
from weighted_mtp_core.training.muon import Muon
from weighted_mtp_core.training.schedules import learning_rate


@frozen(kw_only=True, order=True)
class Part:
    """A part of the model that has a learning rate of its own.

    Attributes:
        name: Name in metrics, such as `head`; empty for parameters that use the learning rate of the stage.
        rate: The learning rate of the part, relative to the learning rate of the stage.
    """

    name: str = ""
    rate: float = 1.0


def check_optimisers(recipe: Recipe) -> None:
    """Refuse optimisers that the installed software does not support.

    Raises:
        WmtpError: The package or the torch release that an optimiser needs is not installed; `adamw_8bit` is
            used on CUDA without Triton or without a C compiler, which compile its update; or torch has no
            type of device with the name `model.device`.
    """
    device = device_type(recipe.model.device)
    if recipe.critic is not None:
        _check_optimiser(recipe.critic.train, device, key="critic.train.optimiser.name")
    _check_optimiser(recipe.train, device, key="train.optimiser.name")


def _check_optimiser(table: TrainTable, device: str, *, key: str) -> None:
    name = table.optimiser.name
    if name == "adamw_8bit" and find_spec("torchao") is None:
        raise WmtpError(
            f'`{key} = "adamw_8bit"` needs the package torchao',
            hint="pip install 'weighted-mtp-core[eightbit]'",
        )
    if name == "adamw_8bit" and device == "cuda":
        if find_spec("triton") is None:
            raise WmtpError(f'`{key} = "adamw_8bit"` needs Triton on CUDA', hint="pip install triton")
        if not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
            raise WmtpError(
                f'`{key} = "adamw_8bit"` needs a C compiler on CUDA, which Triton calls',
                hint="install gcc, or set the variable CC",
            )
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise WmtpError(
            f'`{key} = "muon"` needs torch 2.9 or newer; torch {torch.__version__} is installed',
            hint="pip install 'torch>=2.9'",
        )


def make_optimisers(
    parameters: Iterable[nn.Parameter],
    table: TrainTable,
    *,
    parts: Mapping[nn.Parameter, Part] = MappingProxyType({}),
    embeddings: Collection[nn.Parameter] = (),
) -> list[torch.optim.Optimizer]:
    """Return the optimisers of all parameters that require a gradient.

    Weight decay applies only to parameters with at least two dimensions. Norms and biases have none,
    because their scale needs no bound. Each optimiser skips a step if its attribute `found_inf`, a tensor on
    the device, is 1; see `NonfiniteSteps`.

    Args:
        parameters: The parameters of the model; frozen parameters are ignored.
        table: The recipe's training options for this stage.
        parts: Parts with learning rates of their own, by parameter; `set_learning_rate` applies the rates.
        embeddings: The parameters of embeddings and unembeddings, which `muon` leaves to AdamW.
    """
    groups: dict[tuple[bool, bool, bool, Part], list[nn.Parameter]] = {}
    others = {id(parameter) for parameter in embeddings}
    for parameter in parameters:
        if parameter.requires_grad:  # the fused kernel does not accept sharded and whole parameters together
            is_matrix = parameter.ndim >= 2
            hidden = table.optimiser.name == "muon" and parameter.ndim == 2 and id(parameter) not in others
            key = hidden, is_matrix, isinstance(parameter, DTensor), parts.get(parameter, Part())
            groups.setdefault(key, []).append(parameter)
    found: dict[bool, list[dict[str, object]]] = {}
    for (hidden, is_matrix, _, part), members in sorted(groups.items(), reverse=True):
        decay = table.weight_decay if is_matrix else 0.0
        group = {"params": members, "weight_decay": decay, "rate": part.rate, "part": part.name}
        found.setdefault(hidden, []).append(group)
    return [_make(members, table, hidden=hidden) for hidden, members in found.items()]


def _make(groups: list[dict[str, object]], table: TrainTable, *, hidden: bool) -> torch.optim.Optimizer:
    options = table.optimiser
    if hidden:
        return Muon(groups, lr=table.learning_rate)
    if options.name == "adamw_8bit":
        return EightBitAdamW(groups, lr=table.learning_rate, betas=options.betas, eps=options.epsilon)
    return torch.optim.AdamW(
        groups,
        lr=table.learning_rate,
        betas=options.betas,
        eps=options.epsilon,
        fused=True,  # the fused kernel can skip a step on the device
    )


def set_learning_rate(
    optimisers: Iterable[torch.optim.Optimizer], table: TrainTable, step: int
) -> dict[str, float]:
    """Set the learning rates of a step (0-based); return the rate of each part of the model by name."""
    scheduled = learning_rate(table, step)
    groups = [group for each in optimisers for group in each.param_groups]
    for group in groups:
        group["lr"] = group["rate"] * scheduled
    return {group["part"]: group["lr"] for group in groups}


def clip_gradients(
    parameters: Sequence[nn.Parameter], max_norm: float, *, size: Tensor | float = 1.0
) -> Tensor:
    """Scale gradients down to a total norm of at most `max_norm * sqrt(size)`; return the original norm.

    If all steps had the same limit, steps with many tokens would be clipped most, so their tokens would count
    less than the tokens of other steps. Most of a gradient is noise, and the norm of a sum of n noisy terms
    grows as sqrt(n). The norms of sharded and of unsharded parameters are computed separately, because
    sharded and unsharded tensors cannot be stacked.

    Args:
        parameters: The parameters whose gradients are scaled.
        max_norm: The limit for a step with `size` 1.
        size: The amount of data in the step, divided by the amount in a typical step.
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
