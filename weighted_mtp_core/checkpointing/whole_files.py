"""Writes sharded tensors to one file, tensor by tensor, so that no process has all whole tensors in memory.

All processes must call the functions of this module; the first process writes the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from weighted_mtp_core.runtime.distributed import Distributed
from weighted_mtp_core.runtime.sharding import in_rank_zero
from weighted_mtp_core.storage.atomic import atomic_file

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_torch(tensors: Mapping[str, Tensor], path: Path, distributed: Distributed) -> None:
    """Write a dict of tensors to a file that `torch.load` reads; a tensor with several names is stored once.

    First, torch writes the file without the bytes of the tensors. The bytes of each tensor are then written
    to the tensor's offset in the file.
    """
    with ExitStack() as opened:
        offsets: dict[str, int] = {}
        temporary = None
        if distributed.is_rank_zero:
            temporary = opened.enter_context(atomic_file(path))
            with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
                empty = {id(each): torch.empty(each.shape, dtype=each.dtype) for each in tensors.values()}
                torch.save({name: empty[id(each)] for name, each in tensors.items()}, temporary)
            with FakeTensorMode():
                found = torch.load(temporary, weights_only=True)
            offsets = {
                name: each.untyped_storage()._checkpoint_offset  # noqa: SLF001 - torch documents it
                for name, each in found.items()
            }
        unique = {id(each): (name, each) for name, each in tensors.items()}
        _write_at(dict(unique.values()), temporary, offsets)


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, distributed: Distributed) -> None:
    """Write tensors to a safetensors file."""
    # Tensors with large elements come first, so that all tensors are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    sizes = [tensors[name].numel() * tensors[name].element_size() for name in names]
    ends = list(accumulate(sizes))
    header = json.dumps(
        {
            name: {
                "dtype": _SAFETENSORS_NAMES[tensors[name].dtype],
                "shape": list(tensors[name].shape),
                "data_offsets": [end - size, end],
            }
            for name, size, end in zip(names, sizes, ends, strict=True)
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with ExitStack() as opened:
        temporary = None
        if distributed.is_rank_zero:
            temporary = opened.enter_context(atomic_file(path))
            temporary.write_bytes(len(header).to_bytes(8, "little") + header)
        start = 8 + len(header)
        _write_at(
            tensors,
            temporary,
            {name: start + end - size for name, size, end in zip(names, sizes, ends, strict=True)},
        )


def _write_at(tensors: Mapping[str, Tensor], file: Path | None, offsets: Mapping[str, int]) -> None:
    """Write the bytes of each tensor at its offset into `file`, which is None except in the first process."""
    with ExitStack() as opened:
        descriptor = None
        if file is not None:
            descriptor = os.open(file, os.O_WRONLY)
            opened.callback(os.close, descriptor)
        for name, tensor in tensors.items():
            whole = in_rank_zero(tensor.detach())
            if descriptor is None or whole is None or not whole.numel():
                continue
            left = memoryview(whole.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            place = offsets[name]
            while left:
                written = os.pwrite(descriptor, left, place)
                left, place = left[written:], place + written
