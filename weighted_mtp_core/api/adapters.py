"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) of linear layers, through `peft`.

An adapter adds `s B A x` to the output of a linear layer with input x. A is a matrix of `rank` rows, B a
matrix of `rank` columns, s the scale. B starts at 0, so the output does not change before training.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import quoted

if TYPE_CHECKING:
    from torch import nn


def add_adapters(
    module: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    targets: Sequence[str] = (),
    layers: Iterable[nn.Module] | None = None,
) -> None:
    """Add an adapter to linear layers of a module in place, and freeze all other parameters of the module.

    Args:
        module: The module. Its linear layers are replaced with layers of `peft` that contain them.
        rank: Number of rows of A.
        alpha: The scale s is `alpha / rank`; None means twice the rank.
        dropout: Probability with which, in training, a component of the adapter's input is set to 0.
        rslora: Whether s is `alpha / sqrt(rank)` (Kalajdzievski 2023).
        dora: Whether the norm of each row of the adapted matrix is trained as well (Liu et al. 2024).
        targets: The last parts of the names of the linear layers, for example `q_proj`; empty for all layers.
        layers: The submodules that contain the linear layers to adapt; None for the whole module.

    Raises:
        WmtpError: `peft` is not installed, or there is no linear layer to adapt, or no linear layer of a name
            in `targets`.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise WmtpError(
            f"adapters need the package `{error.name}`, which is not installed",
            hint="pip install 'weighted-mtp-core[adapters]'",
        ) from error
    own = list(module.parameters())
    inside = {id(each) for layer in ([module] if layers is None else layers) for each in layer.modules()}
    names = [name for name, each in module.named_modules() if id(each) in inside and is_linear(each)]
    if not names:
        raise WmtpError("there are no linear layers to adapt", hint="train the whole model instead")
    short = sorted({name.rpartition(".")[2] for name in names})
    for target in targets:
        if target not in short:
            raise WmtpError(
                f"there is no linear layer `{target}` to adapt", hint=f"the layers are {quoted(short)}"
            )
    scale: Any = 2 * rank if alpha is None else alpha  # LoraConfig's type is int, but it divides only
    config = LoraConfig(
        r=rank,
        lora_alpha=scale,
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        target_modules=[name for name in names if not targets or name.rpartition(".")[2] in targets],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # peft sets it itself
        inject_adapter_in_model(config, module)
    base = {id(parameter) for parameter in own}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) not in base)


def is_linear(module: Any) -> bool:
    """Return whether a module is a linear layer; GPT-2 has its own class of linear layers."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)
