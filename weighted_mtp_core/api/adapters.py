"""Add low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) to linear layers, with `peft`.

An adapter adds `s B A x` to the output of a linear layer with input x, where A is a matrix with `rank` rows,
B is a matrix with `rank` columns, and s is a constant scale. With DoRA, each row of the sum of `s B A` and
the layer's own matrix is also scaled to a norm that is trained. The matrix B of each adapter starts at 0, so
adapters do not change the output of a model before training.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
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
    """Add adapters to linear layers of a module in place, and freeze all other parameters of the module.

    Args:
        module: The module to adapt. Each adapted linear layer is replaced with a layer of `peft` that
            contains the linear layer.
        rank: Rank of the adapters, which is the number of rows of A and of columns of B.
        alpha: The scale s is `alpha / rank`, unless `rslora` is set; `alpha = None` means `2 * rank`.
        dropout: Probability that an entry of an adapter's input is set to 0 during training.
        rslora: Whether s is `alpha / sqrt(rank)` instead of `alpha / rank` (Kalajdzievski 2023).
        dora: Whether to also train the norm of each row of the adapted matrix (DoRA, Liu et al. 2024).
        targets: The last parts of the names of the linear layers to adapt, for example `q_proj`; if empty,
            all linear layers in `layers` are adapted.
        layers: The submodules that contain the linear layers to adapt; None for the whole module.

    Raises:
        WmtpError: `peft` is not installed, the module has no linear layer to adapt, a name in `targets`
            matches no linear layer, or an adapter would have no effect.
    """
    from torch import nn

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
    scale: Any = 2 * rank if alpha is None else alpha  # LoraConfig declares an int, but only divides it
    chosen = [name for name in names if not targets or name.rpartition(".")[2] in targets]
    read = read_directly(module, chosen)
    if read:
        own_name = read[0].rpartition(".")[2]
        others = [name for name in short if name not in {each.rpartition(".")[2] for each in read}]
        raise WmtpError(
            f"an adapter of `{own_name}` would have no effect, because the model reads the matrix of this "
            "layer without calling the layer",
            hint=f"set the targets to {quoted(others)}, or to some of them" if others else None,
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=scale,
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        target_modules="|".join(map(re.escape, chosen)),  # in a list, a name would also match longer names
    )
    # For some model families, peft reads the config of the module and renames the targets as in other
    # releases of transformers. This holder has the same children but no config, so peft keeps the names.
    holder = nn.Module()
    for name, child in module.named_children():
        holder.add_module(name, child)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # peft sets it itself
        inject_adapter_in_model(config, holder)
    for name, child in holder.named_children():
        module.add_module(name, child)
    vars(module)["peft_config"] = {"default": config}
    base = {id(parameter) for parameter in own}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) not in base)


def read_directly(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of the linear layers with a weight matrix that the code of the parent module reads.

    If a parent module reads the weight matrix of a linear layer instead of calling the layer, an adapter of
    the layer would have no effect. For example, Mamba layers pass weight matrices to fused kernels.
    """
    found = []
    for name in names:
        parent, _, own = name.rpartition(".")
        kind: Any = type(module.get_submodule(parent))
        code = _code_of(kind)
        if re.search(rf"\bself\.{re.escape(own)}\.weight\b(?!\.(dtype|device|shape))", code):
            found.append(name)
    return found


@functools.cache
def _code_of(kind: type) -> str:
    """Return the source code of a class's methods.

    Methods of `nn.Module` itself, and methods with `init` or `reset` in their name, are left out.
    """
    from torch import nn

    found = []
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        starts = "init" in name or "reset" in name
        if not starts and method.__module__ != nn.Module.__module__:
            with suppress(OSError, TypeError):
                found.append(inspect.getsource(method))
    return "".join(found)


def is_linear(module: Any) -> bool:
    """Return whether a module is a linear layer; transformers' `Conv1D`, which GPT-2 uses, also counts.

    A subclass of `nn.Linear` counts only if it computes a linear map, because the routers of some mixtures of
    experts are subclasses that compute something else.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if type(module) in {nn.Linear, Conv1D} or not isinstance(module, nn.Linear):
        return isinstance(module, nn.Linear | Conv1D)
    probe = torch.ones(1, module.in_features).to(module.weight)
    try:
        with torch.no_grad():
            found, expected = module(probe), nn.functional.linear(probe, module.weight, module.bias)
    except RuntimeError:  # the module cannot be called alone, for example because it is sharded
        return False
    return isinstance(found, torch.Tensor) and torch.allclose(found, expected)
