"""Chooses the device of a run and the dtype of its forward passes, and copies tensors to the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from weighted_mtp_core.errors import WmtpError

READ_EVERY = 10
"""Steps between two reads of a value on an accelerator, because each read synchronises with the device."""


@frozen(kw_only=True)
class Compute:
    """The device of a run and the dtype of its forward passes; parameters and sums stay float32."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def resolve(cls, *, device: str, dtype: str) -> Compute:
        """Choose device and dtype for the values of `model.device` and `model.dtype` in a recipe.

        Raises:
            WmtpError: There is no such device here, or it does not compute in this dtype.
        """
        resolved = resolve_device(device)
        return cls(device=resolved, dtype=resolve_dtype(dtype, resolved))

    def autocast(self) -> torch.autocast:
        """Return the autocast context for a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def to_device(value: Tensor | NDArray[Any], device: torch.device) -> Tensor:
    """Copy a tensor or an array to the device as a tensor; the host does not wait for the copy."""
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    return tensor.to(device, non_blocking=True)


def device_type(name: str) -> str:
    """Return the type of the named device, such as `cuda`, without touching it; `auto` is CUDA or the CPU.

    Apple's GPUs (`mps`) must be named, because the tests have never run on one. Operations that they lack run
    on the CPU: `runtime/environment.py` sets that option of torch.

    Raises:
        WmtpError: torch has no device with such a name.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name).type
    except RuntimeError as error:
        raise _no_device(name, error) from error


def resolve_device(name: str) -> torch.device:
    """Return the named device; see `device_type`.

    Raises:
        WmtpError: There is no such device here.
    """
    kind = device_type(name)
    device = torch.device(kind if name == "auto" else name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _no_device(name, error) from error
    return device


def _no_device(name: str, error: Exception) -> WmtpError:
    return WmtpError(
        f"there is no device `{name}` here: {str(error).splitlines()[0]}",
        hint='set `model.device = "auto"`, or one of cpu, cuda, cuda:1, mps',
    )


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of forward passes; `auto` is bfloat16 on CUDA devices that have it, else float32.

    A CPU without bf16 arithmetic is 18 to 50 times slower in it than in fp32. A CPU with it is faster, but
    then a recipe would no longer give the same numbers on every CPU, so bf16 on a CPU must be requested.

    Raises:
        WmtpError: The device does not compute in bfloat16, or nobody has tried whether it does.
    """
    computes = device.type == "cpu" or (device.type == "cuda" and _has_bfloat16(device))
    if name == "bfloat16" and not computes:
        raise WmtpError(
            f"the device `{device}` does not compute in bfloat16",
            hint='set `model.dtype = "float32"`; bfloat16 needs a CPU or CUDA capability 8.0',
        )
    if name == "auto":
        return torch.bfloat16 if computes and device.type != "cpu" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _has_bfloat16(device: torch.device) -> bool:
    """Return whether a CUDA device computes in bfloat16 itself; torch emulates it slowly on older ones."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
