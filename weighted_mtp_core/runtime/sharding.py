"""Shards parameters over processes (FSDP2), and converts between shards and whole tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from weighted_mtp_core.runtime.distributed import Distributed


def shard(blocks: Iterable[nn.Module], distributed: Distributed) -> None:
    """Shard the parameters of each module over the processes.

    Gradients are summed over the processes, like the gradients of unsharded parameters. Copies of a
    module must be made before the module is sharded.
    """
    mesh: DeviceMesh | None = None
    for block in blocks:
        mesh = mesh or init_device_mesh(next(block.parameters()).device.type, (distributed.size,))
        sharded = fully_shard(block, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(enable=True)


def decoder_layers(policy: nn.Module) -> list[nn.Module]:
    """Return the layers of a policy's trunk and heads: the innermost modules in its lists of modules."""
    listed = [each for module in policy.modules() if isinstance(module, nn.ModuleList) for each in module]
    return [
        block
        for block in listed
        if any(True for _ in block.parameters())
        and not any(isinstance(child, nn.ModuleList) for child in block.modules())
    ]


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor in every process (a collective operation); return other tensors unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(own: Tensor, value: Tensor) -> Tensor:
    """Shard the whole tensor `value`, equal in every process, like `own`; this needs no communication."""
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def all_like(own: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state whose tensors are sharded like the tensors of the same names in `own`."""
    return {
        name: like(own[name], value) if isinstance(own.get(name), DTensor) else value
        for name, value in state.items()
    }


def copy_to_host(tensor: Tensor, into: Tensor | None = None) -> Tensor:
    """Return a copy of a tensor in main memory, with the same sharding.

    Args:
        tensor: The tensor to copy.
        into: An earlier copy that is no longer needed. It is overwritten and returned if it fits, because
            allocating new memory takes several times as long as the copy.
    """
    if into is not None and (into.shape, into.dtype) == (tensor.shape, tensor.dtype):
        local(into).copy_(local(tensor))
        return into
    return tensor.detach().to("cpu", copy=True).contiguous()


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, detached."""
    held = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else held
