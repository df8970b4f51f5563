"""The processes that train together, started by `torchrun`; a single process does not communicate.

Every process has the token ids of the whole global batch, which take little memory, and computes its share of
the rows. The weighting's input, statistics, normalisers and state are therefore the same in every process.
They differ from those of a run with a single process only by rounding, because sums are computed in another
order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.runtime.device import device_type

Item = TypeVar("Item")
_TIMEOUT = timedelta(minutes=30)  # processes wait at most this long while one process prepares or evaluates


@frozen(kw_only=True)
class Distributed:
    """One of the processes that train together.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        control_group: A second process group (gloo), for writing checkpoints during training; None for a
            single process.
    """

    rank: int = 0
    size: int = 1
    control_group: dist.ProcessGroup | None = None

    @classmethod
    def init(cls, device: str) -> Distributed:
        """Join the processes that `torchrun` started; without other processes, return a single process.

        Args:
            device: `model.device` of the recipe. If it is `cuda`, or `auto` on a machine with a GPU, each
                process uses the GPU of its local rank.

        Raises:
            WmtpError: There are several processes, but `device` names a single device or no known device.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        kind = device_type(device)
        if device != "auto" and (kind not in ("cpu", "cuda") or torch.device(device).index is not None):
            raise WmtpError(
                f"`model.device = {device}` is one device, but {size} processes train",
                hint='set `model.device = "auto"`, or cuda or cpu',
            )
        backend = "gloo"
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=_TIMEOUT)
        control_group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), control_group=control_group)

    @property
    def is_single_process(self) -> bool:
        """Whether there is only one process."""
        return self.size == 1

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes files, tracks the run and shows progress."""
        return self.rank == 0

    def shutdown(self) -> None:
        """Leave the process group."""
        if not self.is_single_process:
            dist.destroy_process_group()

    def shard_rows(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's share of consecutive items; the sizes of shares differ by at most one."""
        bounds = [round(len(items) * rank / self.size) for rank in (self.rank, self.rank + 1)]
        return items[bounds[0] : bounds[1]]

    def shard_evenly(self, items: Sequence[Item], *, spare: Item) -> list[Item]:
        """Return this process's share, padded with a spare item to the length of the longest share.

        If parameters are sharded, each item needs collective operations, so all processes need the same
        number of items.
        """
        mine = list(self.shard_rows(items))
        return mine + [spare] * (-(-len(items) // self.size) - len(mine))

    def all_reduce(self, *tensors: Tensor) -> None:
        """Sum tensors over all processes, in place."""
        if not self.is_single_process:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def all_reduce_scalars(self, scalars: Mapping[str, Tensor | float]) -> Mapping[str, Tensor | float]:
        """Sum each scalar over all processes; return the sums under the same names."""
        if self.is_single_process:
            return scalars
        values = on_one_device(scalars.values())
        dist.all_reduce(values)
        return dict(zip(scalars, values.unbind(), strict=True))

    def largest(self, *values: float) -> list[float]:
        """Return the maximum of each value over all processes; this is a collective operation."""
        if self.is_single_process:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return [float(each) for each in found]

    def any_rank(self, *, flag: bool) -> bool:
        """Return whether `flag` is True in any process; this is a collective operation."""
        if self.is_single_process:
            return flag
        counter = torch.tensor([float(flag)])
        dist.all_reduce(counter)
        return bool(counter > 0)

    def broadcast(self, text: str) -> str:
        """Return the first process's text in every process."""
        if self.is_single_process:
            return text
        texts = [text]
        dist.broadcast_object_list(texts, src=0, device=torch.device("cpu"))
        return texts[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if not self.is_single_process:
            self.any_rank(flag=False)  # on the CPU, because a barrier of NCCL launches a kernel on each GPU

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Run the block in the first process, then in the others, which find the first process's files."""
        if not self.is_rank_zero:
            self.barrier()
        yield
        if self.is_rank_zero:
            self.barrier()


def on_one_device(scalars: Iterable[Tensor | float]) -> Tensor:
    """Return scalars as one tensor, float32 `[N]`, on the device of the tensors among them."""
    values = list(scalars)
    device = next((each.device for each in values if isinstance(each, Tensor)), None)
    return torch.stack([torch.as_tensor(each, dtype=torch.float32, device=device) for each in values])


SINGLE_PROCESS = Distributed()
