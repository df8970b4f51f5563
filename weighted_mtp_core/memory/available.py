"""Measures how much memory is free on this machine, on a device and in main memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a CUDA device, or of main memory for a CPU; None if they are not known."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return free_main_memory() if device.type == "cpu" else None


def free_main_memory() -> int | None:
    """Return the free bytes of main memory, within the limits of a container; None if they are unknown.

    On a system without `/proc/meminfo`, such as macOS, all physical memory counts as free.
    """
    known = [each for each in (_of_machine(), *map(left_in_group, _CGROUPS)) if each is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        names = os.sysconf_names
        if "SC_PHYS_PAGES" not in names:
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def left_in_group(files: tuple[str, str]) -> int | None:
    """Return the bytes that a control group may still use; None if it has no limit or cannot be read.

    Page cache counts as free, because the kernel can drop it.
    """
    limit_file, used_file = map(Path, files)
    try:
        limit = limit_file.read_text(encoding="ascii").strip()
        if not limit.isdigit():
            return None
        used = int(used_file.read_text(encoding="ascii"))
        statistics = (used_file.parent / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    cached = sum(
        int(line.split()[1]) for line in statistics if line.startswith(("inactive_file ", "active_file "))
    )
    return max(0, int(limit) - used + cached)
