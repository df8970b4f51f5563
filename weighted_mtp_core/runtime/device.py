"""Chooses how a run computes (device, dtype, TF32, determinism), and copies tensors to the device.

The policy, the critic, reference models and generation share one `Compute`, so they have the same precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.runtime.environment import require_reproducible_cublas

Autocast = Callable[[], AbstractContextManager[Any]]
"""Returns a context manager that sets the precision of a forward pass, as `Compute.autocast` does."""

LEAST_BUCKET = 25 << 20
"""Smallest result of `bucket_bytes`: the default size of a bucket in torch's DistributedDataParallel."""

READ_EVERY = 10
"""Usual number of steps between two reads of a value on an accelerator, because the host waits for a read."""


@frozen(kw_only=True)
class Compute:
    """The device and the precision of a run.

    Sums and trained parameters are float32 in any case; `model.base_dtype` is the dtype of a frozen base.

    Attributes:
        device: The device.
        dtype: The dtype of matrix products in forward passes.
        tf32: Whether float32 matrix products on CUDA devices may round their inputs to TF32.
        deterministic: Whether CUDA devices only use algorithms that always give the same result.
    """

    device: torch.device
    dtype: torch.dtype
    tf32: bool = False
    deterministic: bool = False

    @classmethod
    def resolve(cls, *, device: str, dtype: str, tf32: bool = False, deterministic: bool = False) -> Compute:
        """Choose device and dtype for the values of the recipe's keys `model.device` and `model.dtype`.

        Raises:
            WmtpError: This machine does not have the device, or the device does not support the dtype.
        """
        resolved = resolve_device(device)
        return cls(
            device=resolved,
            dtype=resolve_dtype(dtype, resolved),
            tf32=tf32,
            deterministic=deterministic,
        )

    def apply(self) -> None:
        """Set torch's switches for TF32 and determinism in this process, before anything is computed.

        Raises:
            WmtpError: The user's value of CUBLAS_WORKSPACE_CONFIG prevents deterministic results.
        """
        if self.deterministic:
            require_reproducible_cublas()
        torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cuda.matmul.allow_tf32 = self.tf32

    def autocast(self) -> torch.autocast:
        """Return the autocast context for a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @property
    def precision(self) -> dict[str, str | bool]:
        """The settings that affect exact results on a given device, as plain values."""
        return {"dtype": str(self.dtype), "tf32": self.tf32, "deterministic": self.deterministic}


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast and TF32 within the block, for probes that compute the same result in two ways."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a tensor is multiplied: autocast's or, without autocast, the tensor's."""
    return torch.get_autocast_dtype(tensor.device.type) if _casts(tensor) else tensor.dtype


def _casts(tensor: Tensor) -> bool:
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode in the block; afterwards, also after an error, restore its mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def many_passes(model: nn.Module, autocast: Autocast) -> Iterator[None]:
    """Run many forward passes in the block without gradients.

    If no parameter is sharded, autocast converts each parameter at most once. Autocast keeps converted
    parameters only outside of inference mode, and only if they require a gradient. If parameters are sharded,
    converted copies are not kept, because together they would be the whole model.
    """
    parameters = list(model.parameters())
    with autocast():
        if not _casts(parameters[0]) or any(isinstance(each, DTensor) for each in parameters):
            with torch.inference_mode():
                yield
            return
        frozen = [each for each in parameters if not each.requires_grad and each.is_floating_point()]
        try:
            for parameter in frozen:
                parameter.requires_grad = True
            with torch.no_grad():
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad = False


def memory_of(device: torch.device) -> int | None:
    """Return the memory of a CUDA device in bytes; None for other devices, where callers use fixed sizes."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def bucket_bytes(device: torch.device) -> int:
    """Return the maximum bytes of a gradient bucket: 1/1024 of a CUDA device's memory, at least 25 MiB."""
    return max(LEAST_BUCKET, (memory_of(device) or 0) >> 10)


def to_device(value: Tensor | NDArray[Any], device: torch.device) -> Tensor:
    """Return a tensor or an array as a tensor on the device; the host does not wait for the copy.

    A value that is already on the device is not copied. For a CUDA device, a value in main memory is first
    copied to pinned memory. Without pinned memory, the host would wait until the device has done all earlier
    work.
    """
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def device_type(name: str) -> str:
    """Return the type of the named device, such as `cuda`, without using it; `auto` is CUDA or the CPU.

    Apple's GPUs (`mps`) are used only if they are named, because the tests have never run on one. Operations
    that these GPUs do not support run on the CPU, see `runtime/environment.py`.

    Raises:
        WmtpError: torch has no type of device with this name.
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
        WmtpError: This machine does not have the device.
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
    """Return the dtype of forward passes; `auto` is bfloat16 if a CUDA device supports it, otherwise float32.

    A CPU without bfloat16 arithmetic is 18 to 50 times slower in bfloat16 than in float32. A CPU with
    bfloat16 arithmetic is faster in bfloat16. But if `auto` depended on the CPU, a recipe would give
    different results on different CPUs, so bfloat16 on a CPU must be requested.

    Raises:
        WmtpError: bfloat16 is requested, but the device does not support it or is neither a CPU nor a CUDA
            device.
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
    """Return whether a CUDA device supports bfloat16; on older devices, torch emulates it slowly."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
