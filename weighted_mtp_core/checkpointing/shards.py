"""Tensors split over processes, as files: each process writes its part, any number of processes reads them.

The format is the safetensors form of PyTorch's distributed checkpoints: nothing is pickled, and no process
holds the whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from weighted_mtp_core.runtime.distributed import Distributed


def write_shards(tensors: Mapping[str, Tensor], folder: Path | None, distributed: Distributed) -> None:
    """Write this process's parts; all processes must come here, each in one thread at a time.

    Args:
        tensors: On the CPU, of the same names everywhere; what is whole is written by the first process.
        folder: Where to; only the first process needs to know.
        distributed: The processes.

    Raises:
        OSError: Some process could not write its part.
    """
    told = [str(folder)]
    dist.broadcast_object_list(told, src=0, group=distributed.control_group)
    try:
        save(
            dict(tensors),
            storage_writer=HuggingFaceStorageWriter(told[0], save_distributed=True),
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=distributed.control_group,
        )
    except CheckpointException as error:  # not an Exception; it holds those of each process
        first = next(iter(error.failures.values()))[0]
        raise OSError(f"a process could not write its part: {first}") from error


class Shards(Mapping[str, Tensor]):
    """The tensors that `write_shards` wrote, each put together when it is asked for.

    Args:
        folder: Where they lie.

    Raises:
        OSError, SafetensorError: The files cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(str(folder))
        self._found = self._reader.read_metadata().state_dict_metadata

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor, whole."""
        about = self._found[name]
        if not isinstance(about, TensorStorageMetadata):
            raise KeyError(name)
        tensor = torch.empty(about.size, dtype=about.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*single process.*")  # which is what is meant
            load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class _Reader(HuggingFaceStorageReader):
    """Reads what the files say of themselves once, not for every tensor."""

    _known: Metadata | None = None

    def read_metadata(self) -> Metadata:
        if self._known is None:
            self._known = super().read_metadata()
        return self._known
