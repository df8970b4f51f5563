"""The processes that train together, as `torchrun` starts them; alone, nothing here communicates.

Every process holds the whole global batch as token ids, which costs nothing, and computes its share of the
rows. What the weighting sees, and so its statistics, normalisers and state, is then the same everywhere, and
equal to that of one process but for the order of sums.

Shape letters: B rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

Item = TypeVar("Item")
_TIMEOUT = timedelta(minutes=30)  # the longest that one process prepares or judges while others wait


@frozen(kw_only=True)
class Distributed:
    """One of `size` processes.

    Attributes:
        rank: Which one, from 0.
        size: How many.
        control_group: The same processes once more, for what goes on beside the training; None if alone.
    """

    rank: int = 0
    size: int = 1
    control_group: dist.ProcessGroup | None = None

    @classmethod
    def init(cls) -> Distributed:
        """Meet the other processes that `torchrun` started; without it, be alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=_TIMEOUT)
        control_group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), control_group=control_group)

    @property
    def is_single_process(self) -> bool:
        """Whether there is one process."""
        return self.size == 1

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the process that writes, tracks and speaks."""
        return self.rank == 0

    def shutdown(self) -> None:
        """Part from the others."""
        if not self.is_single_process:
            dist.destroy_process_group()

    def shard_rows(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's consecutive share; shares differ by one item at most."""
        bounds = [round(len(items) * rank / self.size) for rank in (self.rank, self.rank + 1)]
        return items[bounds[0] : bounds[1]]

    def shard_evenly(self, items: Sequence[Item], *, spare: Item) -> list[Item]:
        """Return this process's share, filled up with a spare item to as many as any process has.

        Each item takes all processes where parameters are split over them.
        """
        mine = list(self.shard_rows(items))
        return mine + [spare] * (-(-len(items) // self.size) - len(mine))

    def all_reduce(self, *tensors: Tensor) -> None:
        """Add up tensors over all processes, in place."""
        if not self.is_single_process:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def all_reduce_scalars(self, scalars: Mapping[str, Tensor | float]) -> Mapping[str, Tensor | float]:
        """Add up scalars of the same names over all processes."""
        if self.is_single_process:
            return scalars
        values = torch.stack([torch.as_tensor(value, dtype=torch.float32) for value in scalars.values()])
        dist.all_reduce(values)
        return dict(zip(scalars, values.unbind(), strict=True))

    def any_rank(self, *, flag: bool) -> bool:
        """Say whether the flag is set in some process; all must ask together."""
        if self.is_single_process:
            return flag
        counter = torch.tensor([float(flag)])
        dist.all_reduce(counter)
        return bool(counter > 0)

    def broadcast(self, text: str) -> str:
        """Return the first process's text everywhere."""
        if self.is_single_process:
            return text
        content = text.encode()
        size = torch.tensor([len(content)])
        dist.broadcast(size, 0)
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.is_rank_zero:
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(buffer, 0)
        return bytes(buffer.tolist()).decode()

    def barrier(self) -> None:
        """Wait for all processes."""
        if not self.is_single_process:
            self.any_rank(flag=False)

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Let the first process through before the others: it makes files that they then find."""
        if not self.is_rank_zero:
            self.barrier()
        yield
        if self.is_rank_zero:
            self.barrier()

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of parameters that every process holds; sharded ones are added already."""
        if self.is_single_process:
            return
        works = []
        for parameter in parameters:
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                works.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in works:
            work.wait()


SINGLE_PROCESS = Distributed()


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a total norm; return the norm that they had, scalar.

    Sharded and whole parameters cannot be stacked, so each kind is measured by itself.
    """
    sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    norms = [
        full(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]))
        for kind in (sharded, whole)
    ]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for kind in (sharded, whole):
        nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    total: Tensor = norm
    return total


def shard(blocks: Iterable[nn.Module], distributed: Distributed) -> None:
    """Split the parameters of modules over the processes (FSDP2), each module by itself.

    Gradients are added up, as those of whole parameters are. Copies of the modules must be made before.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (distributed.size,))
    for block in blocks:
        sharded = fully_shard(block, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(enable=True)


def decoder_layers(policy: nn.Module) -> list[nn.Module]:
    """Return the innermost modules of a policy's lists of modules: the layers of trunk and heads."""
    listed = [each for module in policy.modules() if isinstance(module, nn.ModuleList) for each in module]
    return [
        block
        for block in listed
        if any(True for _ in block.parameters())
        and not any(isinstance(child, nn.ModuleList) for child in block.modules())
    ]


def full(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, in every process; all must ask together."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole


def on_host(tensor: Tensor, into: Tensor | None = None) -> Tensor:
    """Return a copy in main memory; of a sharded tensor, this process's part stays a part.

    Args:
        tensor: What to copy.
        into: An earlier copy that is not needed any more: it is overwritten and returned, if it fits.
            Fresh memory costs the system several times what the copy costs.
    """
    if into is not None and (into.shape, into.dtype) == (tensor.shape, tensor.dtype):
        _local(into).copy_(_local(tensor))
        return into
    part = _local(tensor).to("cpu", copy=True).contiguous()
    if not isinstance(tensor, DTensor):
        return part
    copied: Tensor = DTensor.from_local(
        part,
        _host_mesh(tensor.device_mesh.size()),
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return copied


def _local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, without its history."""
    held: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return held.detach()


@cache
def _host_mesh(size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (size,))


def laid_out(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state whose tensors are laid out as those of the same names are now; all must ask together."""
    laid = dict(state)
    for name in sorted(state):  # a file may give its tensors in another order to each process
        if isinstance(state[name], Tensor) and isinstance(own.get(name), Tensor):
            laid[name] = like(own[name], state[name])
    return laid


def like(tensor: Tensor, whole: Tensor) -> Tensor:
    """Return a whole tensor laid out as another one is."""
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)
