"""Measures the peak memory of a process, and the rate at which it computes a large matrix product."""

from __future__ import annotations

import resource
import sys
import time
from functools import cache
from pathlib import Path

import torch

from weighted_mtp_core.runtime.device import Compute

_SECONDS, _REPETITIONS = 0.03, 3
"""Minimum duration in seconds, and minimum number of products, of a measurement.

On two CPU cores, a measurement takes 0.1 s.
"""


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory of this process in bytes: `host`, and `device` if the device is a CUDA device.

    The host's peak is counted since the start of the process, the device's peak since `forget_peak`.
    """
    peaks = {"host": _peak_of_host()}
    if device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(device)
    return peaks


def forget_peak(device: torch.device) -> None:
    """Count the peak memory of a CUDA device from now on; the peak of the host is not reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_of_host() -> int:
    """Return the peak of resident memory in bytes; on Linux, `ru_maxrss` would include the parent's peak."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else ()
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    if kibibytes:
        return kibibytes[0] * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@cache
def matrix_rate(compute: Compute) -> float:
    """Return the rate of the product of two large square matrices, in operations per second.

    The rate is measured once per process for each `compute`, with the threads of the process and the dtype of
    `compute`; the fastest repetition counts. The measurement uses no global random generator, so it does not
    change the results of a run.
    """
    device = compute.device
    size = 1024 if device.type == "cpu" else 8192 if compute.dtype is torch.bfloat16 else 4096
    generator = torch.Generator(device).manual_seed(0)
    left, right, out = (
        torch.randn(size, size, generator=generator, device=device).to(compute.dtype) for _ in range(3)
    )
    torch.mm(left[:256], right, out=out[:256])  # loads the library and starts its threads
    times: list[float] = []
    while len(times) < _REPETITIONS or sum(times) < _SECONDS:
        _wait_for(device)
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait_for(device)
        times.append(time.perf_counter() - began)
    del left, right, out
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return 2 * size**3 / min(times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
