"""Where a run computes: the device, the dtype of forward passes, and the way of tensors to the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from weighted_mtp_core.errors import WmtpError

READ_EVERY = 10
"""Steps between two reads of a value on an accelerator: each read waits for the device."""


@frozen(kw_only=True)
class Compute:
    """The device of a run and the dtype of its forward passes; parameters and sums stay float32."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def resolve(cls, *, device: str, dtype: str) -> Compute:
        """Return what `model.device` and `model.dtype` of a recipe mean on this machine.

        Raises:
            WmtpError: There is no such device here.
        """
        resolved = resolve_device(device)
        return cls(device=resolved, dtype=resolve_dtype(dtype, resolved))

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def to_device(value: Tensor | NDArray[Any], device: torch.device) -> Tensor:
    """Return a tensor, or an array as a tensor, on the device; the host does not wait for the copy."""
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    return tensor.to(device, non_blocking=True)


def resolve_device(name: str) -> torch.device:
    """Return the named device; `auto` takes CUDA, then MPS, then the CPU.

    Operations that MPS lacks run on the CPU: `weighted_mtp_core/__init__.py` sets that option of torch.

    Raises:
        WmtpError: There is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise WmtpError(
            f"there is no device `{name}` here: {str(error).splitlines()[0]}",
            hint='set `model.device = "auto"`, or one of cpu, cuda, cuda:1, mps',
        ) from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of forward passes; `auto` is bfloat16 on CUDA devices that support it, else float32.

    A CPU without bf16 arithmetic is 18 to 50 times slower in it than in fp32. A CPU with it is faster, but
    then a recipe would no longer give the same numbers on every CPU, so bf16 on a CPU must be requested.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.float32
