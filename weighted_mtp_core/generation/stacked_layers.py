"""Stacks several layers into one layer, which applies the parameters of each layer to a group of rows.

For a few tokens, kernel launches determine the time of a layer, so three layers take three times as long as
one. If the inputs of all layers are available at once, one call is enough: the rows of the first layer are
followed by the rows of the second layer, and so on. Attention and other operations without parameters treat
all groups alike.

Shape letters: L layers, R rows of each, X = L R rows, T positions, H hidden, I inputs, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from weighted_mtp_core.runtime.device import product_dtype


def stack(layers: Sequence[nn.Module]) -> nn.Module | None:
    """Return a layer that computes states `[L R, T, H]`, or None if the layers cannot be stacked.

    Parameters may be copied, so they must not change while the result is in use. Layers with sharded
    parameters (FSDP2) cannot be stacked, because their parameters are complete only while the layer itself is
    called. Layers with lists of modules, such as experts, cannot be stacked either: each expert gets the rows
    that are routed to it, so groups would differ in size. Layers with adapters cannot be stacked, because
    they look up their adapters by name in a dictionary of modules. Finally, layers cannot be stacked if they
    have parameters that belong neither to a plain `nn.Linear` nor to a module without submodules whose
    parameters are all vectors, such as a norm.
    """
    first = layers[0]
    if any(isinstance(module, FSDPModule | nn.ModuleList | nn.ModuleDict) for module in first.modules()):
        return None
    stacked = copy.deepcopy(first, {id(each): each for each in first.parameters()})
    for name, module in first.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        if not name or any(True for _ in module.children()):
            return None
        modules = [layer.get_submodule(name) for layer in layers]
        if type(module) is nn.Linear:  # a subclass may compute something else
            stacked.set_submodule(name, _Linears(modules))
        elif all(parameter.dim() == 1 for parameter in module.parameters()):
            stacked.set_submodule(name, _stack_norms(modules))
        else:
            return None
    return stacked


class _Linears(nn.Module):
    """Linear modules of the same shape, computed in one batched product."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        # A transposed view, because products with few rows are slower with a contiguous copy.
        weight_LOI = torch.stack([each.get_parameter("weight") for each in modules])
        self.weight_LIO = weight_LOI.to(product_dtype(weight_LOI)).mT
        biases: list[Tensor] = [each.get_parameter("bias") for each in modules if each.bias is not None]
        self.bias_L1O = torch.stack(biases)[:, None] if biases else None

    def forward(self, input_XTI: Tensor) -> Tensor:
        """Return the outputs of all groups, `[X, T, O]`."""
        input_LXI = input_XTI.reshape(self.weight_LIO.shape[0], -1, input_XTI.shape[-1])
        if self.bias_L1O is None:
            output_LXO = torch.bmm(input_LXI, self.weight_LIO)
        else:
            output_LXO = torch.baddbmm(self.bias_L1O, input_LXI, self.weight_LIO)
        return output_LXO.view(*input_XTI.shape[:-1], -1)


def _stack_norms(modules: Sequence[nn.Module]) -> nn.Module:
    """Return norms as one module.

    The module computes all groups of rows at once if a probe shows that the norms' code supports one weight
    per group; otherwise the module calls the norms one by one.
    """
    stacked, one_by_one = _Norms(modules), _OneByOne(modules)
    weight = next(modules[0].parameters())
    # No random numbers, because drawing them would change the later random numbers of a training run.
    probe_L1H = torch.linspace(-1, 1, len(modules) * len(weight)).view(len(modules), 1, -1).to(weight)
    try:
        return stacked if torch.equal(stacked(probe_L1H), one_by_one(probe_L1H)) else one_by_one
    except RuntimeError:  # torch's own kernels accept only one weight
        return one_by_one


class _Norms(nn.Module):
    """Norms that multiply by a weight of any shape, like the norms of transformers."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.count = len(modules)
        self.norm = copy.deepcopy(modules[0])
        for name, _ in modules[0].named_parameters():
            parameter_L1H = torch.stack([each.get_parameter(name) for each in modules])[:, None]
            setattr(self.norm, name, nn.Parameter(parameter_L1H, requires_grad=False))

    def forward(self, input_XTI: Tensor) -> Tensor:
        """Return the normed inputs, `[X, T, I]`."""
        normed: Tensor = self.norm(input_XTI.reshape(self.count, -1, input_XTI.shape[-1]))
        return normed.view(input_XTI.shape)


class _OneByOne(nn.Module):
    """Modules that treat each row independently, called one after the other."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, input_XTI: Tensor) -> Tensor:
        """Return the outputs of all groups."""
        groups = input_XTI.chunk(len(self.each))
        return torch.cat([module(group) for module, group in zip(self.each, groups, strict=True)])
