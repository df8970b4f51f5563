"""AdamW whose two moments have 8 bits per value."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weighted_mtp_core.training.one_by_one import OneByOne

_BLOCK, _FEWEST = 256, 4096
_NO_BLOCK = 1 << 62  # torchao then uses 32 bits
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


class EightBitAdamW(OneByOne):
    """torchao's AdamW with moments quantised in blocks of 256 values (Dettmers et al. 2022).

    Parameters of fewer than 4096 values keep moments of 32 bits, and so do those that cannot be divided into
    whole blocks, or that are not sharded into equal shards of whole blocks. On a CPU, torchao's update runs
    operation by operation instead of compiled, so that no compiler is needed.

    Args:
        groups: Groups of parameters, with `weight_decay`.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
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
        """Update a parameter by its gradient.

        The state is `step` and the two moments: each as `codes`, uint8 with the shape of the parameter, and
        `scale`, one float32 per block; or as one tensor of 32 bits.
        """
        from torchao.optim import AdamW8bit

        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        block = _BLOCK if _has_blocks(original) else _NO_BLOCK
        adamw = AdamW8bit([parameter], **options, block_size=block)
        if state:
            adamw.state[parameter] = self._packed(state, parameter)
        with _eager() if parameter.device.type == "cpu" else nullcontext():
            adamw.step()
        return _plain(adamw.state[parameter])

    def adopt(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Convert moments of 8 bits to 32 bits if the parameter is now sharded without regard to blocks."""
        if _has_blocks(parameter) or "exp_avg_codes" not in state:
            return state
        return {
            name: tensor.dequantize() if name in _SIGNED else tensor
            for name, tensor in self._packed(state, parameter).items()
        }

    def _packed(self, state: Mapping[str, Tensor], parameter: nn.Parameter) -> dict[str, Any]:
        """Return the result of `_plain` as torchao's state."""
        from torchao.optim.subclass_8bit import OptimState8bit

        found: dict[str, Any] = {"step": state["step"]}
        for name, signed in _SIGNED.items():
            if name in state:
                found[name] = state[name]
                continue
            codes, scale = state[f"{name}_codes"], state[f"{name}_scale"]
            at = signed, codes.device
            if at not in self._maps:  # made once, because copying it to the device would wait for the device
                self._maps[at] = OptimState8bit.zeros((_BLOCK,), signed, device=codes.device).qmap
            found[name] = OptimState8bit(codes, scale, self._maps[at], signed, parameter.dtype)
        return found


def _has_blocks(parameter: nn.Parameter) -> bool:
    """Return whether every process has equally many whole blocks of a parameter."""
    shards = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
    size = parameter.numel() // shards
    return parameter.shape[:1].numel() % shards == 0 and size >= _FEWEST and size % _BLOCK == 0


def _eager() -> AbstractContextManager[None]:
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return torchao's state as tensors of ordinary classes."""
    found = {"step": state["step"]}
    for name in _SIGNED:
        moment: Any = state[name]
        if hasattr(moment, "codes"):
            found |= {f"{name}_codes": moment.codes, f"{name}_scale": moment.scale}
        else:
            found[name] = moment
    return found
