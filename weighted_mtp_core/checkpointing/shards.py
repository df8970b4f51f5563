"""Files of sharded tensors: each process writes its shards, and any number of processes can read them.

The format is the safetensors variant of PyTorch's distributed checkpoints: nothing is pickled, and no process
needs memory for all tensors.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
    _gen_file_name,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from weighted_mtp_core.runtime.distributed import Distributed
from weighted_mtp_core.storage.atomic import sync_to_disk


def write_shards(tensors: Mapping[str, Tensor], folder: Path | None, distributed: Distributed) -> None:
    """Write the shards of this process; all processes must call `write_shards`, from one thread at a time.

    Args:
        tensors: Tensors in main memory, with the same names in every process; the first process also writes
            the unsharded tensors.
        folder: The folder for the files; only the value in the first process is used.
        distributed: The processes that train together.

    Raises:
        OSError: A process could not write its shards.
    """
    folders = [str(folder)]
    dist.broadcast_object_list(folders, src=0, group=distributed.control_group)
    try:
        save(
            dict(tensors),
            storage_writer=_Writer(folders[0], save_distributed=True),
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=distributed.control_group,
        )
    except CheckpointException as error:  # a BaseException with the errors of the processes that failed
        first = next(iter(error.failures.values()))[0]
        raise OSError(f"a process could not write its part: {first}") from error


class _Writer(HuggingFaceStorageWriter):
    """Writes tensors without copying them; the base class would first copy all tensors twice."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[str, Tensor] = {}
        places: dict[str, Any] = {}
        for item in plan.items:
            assert item.tensor_data is not None
            data = planner.resolve_data(item)
            assert isinstance(data, Tensor)
            tensors[item.index.fqn] = data.contiguous()
            places[item.index.fqn] = {SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
        if tensors:
            file = Path(self.path) / _gen_file_name(1, 1, plan.storage_data["shard_index"])
            metadata = {
                CUSTOM_METADATA_KEY: json.dumps(places),
                DCP_VERSION_KEY: str(HF_DCP_VERSION),
                FORMAT_KEY: FORMAT_VALUE,
            }
            save_file(tensors, file, metadata=metadata)
            sync_to_disk(file)
        written: Future[list[WriteResult]] = Future()
        written.set_result([])  # results are needed only to join the files of all processes
        return written


class Shards(Mapping[str, Tensor]):
    """The tensors that `write_shards` wrote, keyed by name; a tensor is assembled from all files on access.

    Args:
        folder: The folder that contains the files.

    Raises:
        OSError, SafetensorError: A file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(str(folder))
        self._found = self._reader.metadata.state_dict_metadata

    def __getitem__(self, name: str) -> Tensor:
        """Return a whole, unsharded tensor."""
        about = self._found[name]
        if not isinstance(about, TensorStorageMetadata):
            raise KeyError(name)
        tensor = torch.empty(about.size, dtype=about.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*single process.*")  # a single process is intended
            load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class _Reader(HuggingFaceStorageReader):
    """Reads the headers of the files once; the base class would read all headers once per tensor."""

    @cached_property
    def metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self) -> Metadata:
        return self.metadata
