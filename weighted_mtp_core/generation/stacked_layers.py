"""Several layers as one: a layer that does for groups of rows what each layer does for its own.

For a few tokens a layer costs its calls, not its arithmetic, and three layers cost three times as many. Where
their inputs are known together, one call does: rows that were the first layer's come first, then those of
the second. Attention and whatever else has no parameters does not care whose rows they are.

Shape letters: L layers, R rows of each, T positions, I inputs, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def stack(layers: Sequence[nn.Module]) -> nn.Module | None:
    """Return a layer of `[L R, T, H]` states; None if these layers have a part that cannot be stacked.

    Parameters of linear parts are copied, so what is learnt later is not in it. Layers whose parameters are
    split over processes are whole only while they are called, one by one. Of a list of parts, experts say,
    each is called with the rows that chose it, and groups would no longer be of one size.
    """
    first = layers[0]
    if any(isinstance(part, FSDPModule | nn.ModuleList) for part in first.modules()):
        return None
    stacked = copy.deepcopy(first, {id(each): each for each in first.parameters()})
    for name, part in first.named_modules():
        if not any(True for _ in part.parameters(recurse=False)):
            continue
        if not name or any(True for _ in part.children()):
            return None
        parts = [layer.get_submodule(name) for layer in layers]
        if type(part) is nn.Linear:  # of a subclass nobody knows what else it does
            stacked.set_submodule(name, _Linears(parts))
        elif all(parameter.dim() == 1 for parameter in part.parameters()):
            stacked.set_submodule(name, _norm(parts))
        else:
            return None
    return stacked


class _Linears(nn.Module):
    """Linear layers of one shape."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        # Seen from the other side, not laid out anew: products with few rows are faster so.
        self.weight_LIO = torch.stack([part.get_parameter("weight") for part in parts]).mT
        biases: list[Tensor] = [part.get_parameter("bias") for part in parts if part.bias is not None]
        self.bias_L1O = torch.stack(biases)[:, None] if biases else None

    def forward(self, input_XTI: Tensor) -> Tensor:
        """Return `[L R, T, O]`."""
        input_LXI = input_XTI.reshape(self.weight_LIO.shape[0], -1, input_XTI.shape[-1])
        if self.bias_L1O is None:
            output_LXO = torch.bmm(input_LXI, self.weight_LIO)
        else:
            output_LXO = torch.baddbmm(self.bias_L1O, input_LXI, self.weight_LIO)
        return output_LXO.view(*input_XTI.shape[:-1], -1)


def _norm(parts: Sequence[nn.Module]) -> nn.Module:
    """Return norms of one kind as one, where that kind can multiply by a weight for each group of rows."""
    one = _Norms(parts)
    width = next(parts[0].parameters())
    # Not random numbers: those of a training that decodes in between are to stay as they are.
    probe_L1H = torch.linspace(-1, 1, len(parts) * len(width)).view(len(parts), 1, -1).to(width)
    each = _OneByOne(parts)
    try:
        return one if torch.equal(one(probe_L1H), each(probe_L1H)) else each
    except RuntimeError:  # torch's own kernels take one weight
        return each


class _Norms(nn.Module):
    """Norms that multiply what is normalised by a weight, whatever its shape, as transformers' own do."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.count = len(parts)
        self.part = copy.deepcopy(parts[0])
        for name, _ in parts[0].named_parameters():
            together = torch.stack([part.get_parameter(name) for part in parts])[:, None]
            setattr(self.part, name, nn.Parameter(together, requires_grad=False))

    def forward(self, input_XTI: Tensor) -> Tensor:
        """Return the rows, normed group by group."""
        normed: Tensor = self.part(input_XTI.reshape(self.count, -1, input_XTI.shape[-1]))
        return normed.view(input_XTI.shape)


class _OneByOne(nn.Module):
    """Parts that work row by row, called one after the other."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, input_XTI: Tensor) -> Tensor:
        """Return what each part says of its rows."""
        groups = input_XTI.chunk(len(self.parts))
        return torch.cat([part(group) for part, group in zip(self.parts, groups, strict=True)])
