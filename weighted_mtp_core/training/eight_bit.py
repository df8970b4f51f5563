"""AdamW that stores its two moments with 8 bits per value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weighted_mtp_core.training.one_by_one import OneByOne

_BLOCK, _FEWEST = 256, 4096
_PIECE = 1 << 16  # values per uncompiled update; few, because each operation makes a temporary tensor
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


class EightBitAdamW(OneByOne):
    """torchao's AdamW with moments quantised in blocks of 256 values (Dettmers et al. 2022).

    The moments of a parameter have 32 bits if a process holds fewer than 4096 of its values, if these values
    do not fill whole blocks, or if the parameter has shards of different sizes. On CUDA, torchao's update is
    compiled. On other devices, the update runs operation by operation, so that no compiler is needed.

    Args:
        groups: Groups of parameters; each group is a dict with `params` and `weight_decay`.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Constant that is added to the denominator of the update.
    """

    needs_whole = False

    def __init__(
        self, groups: list[dict[str, object]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self._maps: dict[tuple[bool, torch.device], Tensor] = {}

    def update(
        self,
        parameter: nn.Parameter,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
        *,
        original: nn.Parameter,
    ) -> Mapping[str, Tensor]:
        """Update a parameter with its gradient.

        The state contains `step` and the moments `exp_avg` and `exp_avg_sq`. A moment of 8 bits is stored as
        `<moment>_codes`, uint8 with the shape of the parameter, and `<moment>_scale`, one float32 per block.
        A moment of 32 bits is one tensor, `<moment>`.
        """
        from torchao.optim import AdamW8bit

        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        held = dict(state) or _start(parameter, blocks=_has_blocks(original))
        compiled, gradient = parameter.device.type == "cuda", parameter.grad
        assert gradient is not None
        size = max(1, parameter.numel()) if compiled else _PIECE
        for first in pieces(parameter.numel(), size):
            piece = nn.Parameter(_span(parameter.detach(), first, size))
            piece.grad = _span(gradient.contiguous(), first, size)
            adamw = AdamW8bit([piece], **options)
            adamw.state[piece] = self._packed(held, parameter.dtype, first=first, size=size)
            with nullcontext() if compiled else _eager():
                adamw.step()  # changes the moments in `held`
        held["step"] += 1
        return held

    def adopt(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Convert 8-bit moments to 32 bits if the parameter's present shards need 32-bit moments."""
        if _has_blocks(parameter) or "exp_avg_codes" not in state:
            return state
        codes = state["exp_avg_codes"]
        packed = self._packed(state, parameter.dtype, first=0, size=codes.numel())
        return {
            name: tensor.dequantize().view(codes.shape) if name in _SIGNED else tensor
            for name, tensor in packed.items()
        }

    def _packed(
        self, state: Mapping[str, Tensor], dtype: torch.dtype, *, first: int, size: int
    ) -> dict[str, Any]:
        """Return a piece of a state in torchao's format; tensors except `step` share the state's memory."""
        from torchao.optim.subclass_8bit import OptimState8bit

        found: dict[str, Any] = {"step": state["step"].clone()}
        for name, signed in _SIGNED.items():
            if name in state:
                found[name] = _span(state[name], first, size)
                continue
            codes = _span(state[f"{name}_codes"], first, size)
            scale = _span(state[f"{name}_scale"], first // _BLOCK, size // _BLOCK)
            at = signed, codes.device
            if at not in self._maps:  # made once, because the host waits while a table is copied to a device
                self._maps[at] = OptimState8bit.zeros((_BLOCK,), signed, device=codes.device).qmap
            found[name] = OptimState8bit(codes, scale, self._maps[at], signed, dtype)
        return found


def pieces(count: int, size: int) -> Sequence[int]:
    """Return the first index of each piece of `size` values; the last piece may have fewer values."""
    return range(0, count, size)


def _span(tensor: Tensor, first: int, size: int) -> Tensor:
    """Return up to `size` values of a contiguous tensor as a view, from index `first` of the flat tensor."""
    return tensor.view(-1)[first : first + size]


def _start(parameter: nn.Parameter, *, blocks: bool) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step."""
    found = {"step": torch.zeros((), device=parameter.device)}
    for name in _SIGNED:
        if blocks:
            found[f"{name}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8, requires_grad=False)
            found[f"{name}_scale"] = parameter.new_zeros(parameter.numel() // _BLOCK, dtype=torch.float32)
        else:
            found[name] = torch.zeros_like(parameter, requires_grad=False)
    return found


def _has_blocks(parameter: nn.Parameter) -> bool:
    """Return whether every process holds the same number of values: at least 4096, in whole blocks."""
    shards = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
    size = parameter.numel() // shards
    return parameter.shape[:1].numel() % shards == 0 and size >= _FEWEST and size % _BLOCK == 0


def _eager() -> AbstractContextManager[None]:
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
