"""Stores the matrices of a frozen base model in the dtype `model.base_dtype`, which saves memory.

The matrix of a linear layer is converted to the dtype of the product whenever it is used, in the forward and
in the backward pass, and the converted matrix is not kept. `nf4` is 4-bit NormalFloat with one float32 scale
per block of 64 numbers (QLoRA, Dettmers et al. 2023, section 3). With `nf4`, only linear layers are stored in
4 bits; the embedding and the unembedding are stored in bfloat16. Norms and biases stay float32.

Shape letters: I inputs and O outputs of a linear layer, X other dimensions, H hidden, R blocks, B numbers of
a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weighted_mtp_core.api.adapters import read_directly
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.unembedding import Unembedding
from weighted_mtp_core.recipe.schema import BaseDtype
from weighted_mtp_core.runtime.sharding import shard_like, whole

_BLOCK = 64
_HALF_GAP = 0.153  # just above half the largest distance between neighbouring nf4 values, -1 and -0.696


class _Product(torch.autograd.Function):
    """Computes `x W^T` for an input x and a stored matrix W; the backward pass reads W again."""

    @staticmethod
    def forward(context: Any, input_XI: Tensor, layer: Any) -> Tensor:
        context.layer = layer
        product: Tensor = input_XI @ layer.matrix(input_XI.dtype).T
        return product

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient_XO,) = gradients
        return gradient_XO @ context.layer.matrix(gradient_XO.dtype), None


class _Bfloat16Linear(nn.Linear):
    """A linear layer with a frozen matrix in bfloat16."""

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix `[O, I]`."""
        return self.weight.to(dtype)

    def forward(self, input_XI: Tensor) -> Tensor:
        """Return the output `[..., O]` in autocast's dtype or, without autocast, in the input's dtype."""
        device = input_XI.device.type
        dtype = input_XI.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        product_XO: Tensor = _Product.apply(input_XI.to(dtype), self)  # type: ignore[no-untyped-call]
        return product_XO if self.bias is None else product_XO + self.bias.to(dtype)


class _Nf4Linear(_Bfloat16Linear):
    """A linear layer with a frozen matrix in nf4: two numbers per byte, and one scale per block."""

    scale: Tensor

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix `[O, I]`."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        shape = _rows_of_blocks(self.out_features * self.in_features)
        state: Any = QuantState(  # type: ignore[no-untyped-call]
            self.scale, shape=shape, blocksize=_BLOCK, quant_type="nf4", dtype=dtype
        )
        found: Tensor = dequantize_4bit(self.weight, state)
        return found.view(self.out_features, self.in_features)


class _Bfloat16Embedding(nn.Embedding):
    """An embedding with a frozen table in bfloat16 and float32 outputs."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings of token ids, float32 `[..., H]`."""
        return super().forward(ids).float()


def store_base(model: nn.Module, dtype: BaseDtype) -> None:
    """Convert the frozen matrices of a float32 model to `dtype`, in place.

    A layer of a subclass of `nn.Linear` or `nn.Embedding`, which may compute more than its base class, stays
    float32.

    Raises:
        WmtpError: `bitsandbytes` is not installed or computes wrong values on this machine, or the model has
            many matrices outside of linear layers or reads a matrix without calling its layer.
    """
    if dtype == "float32":
        return
    _refuse_other_matrices(model, dtype)
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            _pack(module) if dtype == "nf4" else _shorten(module, _Bfloat16Linear)
        elif type(module) is nn.Embedding and not module.weight.requires_grad:
            _shorten(module, _Bfloat16Embedding)
    kept = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, Unembedding) and id(module.weight) not in kept:
            _shorten_in_place(module.weight)
        if isinstance(module, Unembedding):
            module.stored = module.weight.dtype == torch.bfloat16


@torch.no_grad()
def restore_base(model: nn.Module) -> None:
    """Convert all stored matrices to float32, in place."""
    for module in model.modules():
        if isinstance(module, _Nf4Linear):
            module.weight = nn.Parameter(module.matrix(torch.float32), requires_grad=False)
            del module.scale
        if isinstance(module, _Bfloat16Linear):
            _become(module, nn.Linear)
        elif isinstance(module, _Bfloat16Embedding):
            _become(module, nn.Embedding)
        elif isinstance(module, Unembedding):
            module.stored = False
        else:
            continue
        module.weight.data = module.weight.data.float()


def _refuse_other_matrices(model: nn.Module, dtype: BaseDtype) -> None:
    """Refuse a model in which too many matrices would stay float32, or which bypasses its linear layers.

    At most a tenth of all frozen parameters may be in matrices outside of linear layers and embeddings.
    """
    frozen = {id(each): each.numel() for each in model.parameters() if not each.requires_grad}
    linear, others = [], dict[str, int]()
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            linear.append(name)
        elif not isinstance(module, nn.Embedding | Unembedding):
            matrices = [each for each in module.parameters(recurse=False) if each.ndim > 1]
            kind = type(module).__name__
            others[kind] = others.get(kind, 0) + sum(frozen.get(id(each), 0) for each in matrices)
    largest = max(others, key=lambda kind: others[kind])
    what = f"in layers of the class `{largest}`" if sum(others.values()) > sum(frozen.values()) / 10 else None
    if read := read_directly(model, linear):
        what = f"read without a call of their layers (`{read[0]}`)"
    if what is not None:
        raise WmtpError(
            f"the matrices of this model cannot be stored in {dtype}: they are {what}",
            hint='set `model.base_dtype = "float32"`',
        )


def _shorten(module: nn.Module, kind: type[nn.Module]) -> None:
    _shorten_in_place(module.get_parameter("weight"))  # the same object may also be the unembedding's
    _become(module, kind)


def _shorten_in_place(weight: nn.Parameter) -> None:
    if isinstance(weight, DTensor):  # assigning to its `data` would not change the shard
        shorter = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
        torch.utils.swap_tensors(weight, shorter)  # type: ignore[no-untyped-call]
    else:
        weight.data = weight.data.bfloat16()


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a module in place, so that all references to the module stay valid."""
    module.__class__ = kind


def _pack(module: nn.Linear) -> None:
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError as error:
        raise WmtpError(
            f'`model.base_dtype = "nf4"` needs the package `bitsandbytes`, which is not installed ({error})',
            hint="pip install 'weighted-mtp-core[nf4]'",
        ) from error
    sharded, exact = module.weight, whole(module.weight.detach())
    exact_RB = exact.reshape(_rows_of_blocks(exact.numel()))
    packed, state = quantize_4bit(exact_RB, blocksize=_BLOCK, quant_type="nf4")
    module.weight = nn.Parameter(packed, requires_grad=False)
    module.register_buffer("scale", state.absmax, persistent=False)
    _become(module, _Nf4Linear)
    assert isinstance(module, _Nf4Linear)
    error_RB = (module.matrix(torch.float32).view(exact_RB.shape) - exact_RB).abs()
    right_RB = error_RB <= _HALF_GAP * exact_RB.abs().amax(dim=1, keepdim=True)
    if bool((~right_RB).any()):
        raise WmtpError(
            "`bitsandbytes` does not read its own 4-bit matrices correctly on this machine",
            hint='install another version of it, or set `model.base_dtype = "bfloat16"`',
        )
    module.weight = nn.Parameter(shard_like(sharded, packed), requires_grad=False)


def _rows_of_blocks(count: int) -> torch.Size:
    """Return a shape for `count` numbers: one block per row, or a single row if the last block is shorter.

    On CPUs, bitsandbytes 0.50 mixes up the blocks of matrices whose rows are not whole blocks.
    """
    return torch.Size([1, count] if count % _BLOCK else [count // _BLOCK, _BLOCK])
