"""Choose where a run computes and in which dtype; nothing else in a recipe depends on it."""

from __future__ import annotations

import torch

from weighted_mtp_core.errors import WmtpError


def resolve_device(name: str) -> torch.device:
    """Return the named device; `auto` takes CUDA, then MPS, then the CPU.

    What MPS cannot do runs on the CPU: the package's own `__init__` says so to torch.

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
    """Return the dtype of forward passes; `auto` is bfloat16 on CUDA that computes in it, else float32.

    A CPU without bf16 arithmetic is 18 to 50 times slower in it than in fp32. One with it is faster, but then
    a recipe would no longer give the same numbers on every CPU, so it has to be asked for.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.float32
