"""Computes the SHA-256 of a state: its names, tensors and plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weighted_mtp_core.runtime.sharding import whole

BASE_SHA256 = "base_sha256"
"""Name of a module's buffer, uint8 `[32]`, with the SHA-256 of its frozen parameters.

Checkpoints of a module with this buffer contain the buffer instead of the frozen parameters.
"""


def state_sha256(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a state's names, tensors (dtype, shape and bytes) and plain values."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            plain = whole(value.detach()).cpu().contiguous()
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {json.dumps(value, sort_keys=True)}\n".encode())
    return digest.hexdigest()
