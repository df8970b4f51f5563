"""Shards parameters over processes, and converts between sharded and whole tensors.

A sharded parameter is a `DTensor` that is cut along its first dimension. A module with sharded parameters can
be copied and loaded, but it cannot be called before `fsdp` makes it callable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from weighted_mtp_core.runtime.distributed import Distributed


def mesh_of(distributed: Distributed, device: torch.device) -> DeviceMesh:
    """Return the processes as a mesh of devices (a collective operation)."""
    return init_device_mesh(device.type, (distributed.size,))


def mesh_of_parameters(module: nn.Module) -> DeviceMesh | None:
    """Return the mesh over which a module's parameters are sharded; None if they are not sharded."""
    sharded = (each for each in module.parameters() if isinstance(each, DTensor))
    return next((each.device_mesh for each in sharded), None)


def shard_matrices(modules: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Replace the matrices of modules with sharded copies; norms and biases remain whole in each process.

    A parameter that several modules share remains shared. If a parameter is on the device `meta`, its shards
    are on `meta`, too.
    """
    done: dict[int, nn.Parameter] = {}
    for owner in (each for module in modules for each in module.modules()):
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.ndim < 2 or isinstance(parameter, DTensor):
                continue
            if id(parameter) not in done:
                shard = _shard_of(parameter.detach(), mesh, copy=True)
                done[id(parameter)] = nn.Parameter(shard, requires_grad=parameter.requires_grad)
            setattr(owner, name, done[id(parameter)])


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model or a policy.

    The layers are the members of its innermost lists of modules, except members without parameters.
    """
    listed = [each for module in model.modules() if isinstance(module, nn.ModuleList) for each in module]
    return [
        block
        for block in listed
        if any(True for _ in block.parameters())
        and not any(isinstance(child, nn.ModuleList) for child in block.modules())
    ]


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Gather a sharded tensor in every process (a collective operation); return other tensors as they are.

    If `dtype` is given, the result has this dtype, and shards are converted before they are sent.
    """
    tensor = tensor if dtype is None else tensor.to(dtype)
    # Each process computes a part of the gathered tensor's gradient; the gradient is the sum of these parts.
    return tensor.full_tensor(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor


def in_rank_zero(tensor: Tensor) -> Tensor | None:
    """Gather a sharded tensor in the first process (a collective operation); other processes return None.

    A tensor that is not sharded is returned as it is.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    group, size = tensor.device_mesh.get_group(), tensor.device_mesh.size()
    rows = -(-tensor.shape[0] // size)
    own = local(tensor)
    padded = own if len(own) == rows else torch.cat([own, own.new_zeros(rows - len(own), *own.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(size)] if dist.get_rank() == 0 else None
    dist.gather(padded.contiguous(), parts, group=group, group_dst=0)
    return None if parts is None else torch.cat(parts)[: tensor.shape[0]]


def sum_into_shard(own: DTensor, value: Tensor) -> Tensor:
    """Sum whole tensors over the processes (a collective operation); return the sum, sharded like `own`."""
    return DTensor.from_local(value, own.device_mesh, [Partial()], run_check=False).redistribute(
        placements=own.placements
    )


def all_processes_agree(module: nn.Module, flags: Tensor) -> Tensor:
    """Return, for each of N flags, whether it is true in every process with shards of a module, bool `[N]`.

    The function is a collective operation. If the module is not sharded, the flags are returned as they are.
    """
    mesh = mesh_of_parameters(module)
    if mesh is None:
        return flags
    found = flags.to(mesh.device_type, torch.int32)
    dist.all_reduce(found, op=dist.ReduceOp.MIN, group=mesh.get_group())
    return found.bool()


def shard_like(own: Tensor, value: Tensor) -> Tensor:
    """Return a copy of the whole tensor `value`, sharded like `own`; if `own` is whole, return `value`."""
    return _shard_of(value, own.device_mesh, copy=True) if isinstance(own, DTensor) else value


def like(own: Tensor, value: Tensor) -> Tensor:
    """Shard the whole tensor `value`, equal in every process, like `own`; this needs no communication.

    The result may share memory with `value`; if `own` is whole, the result is `value` itself.
    """
    return _shard_of(value, own.device_mesh) if isinstance(own, DTensor) else value


def all_like(own: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state whose tensors are sharded like the tensors of the same names in `own`."""
    return {
        name: like(own[name], value) if isinstance(own.get(name), DTensor) else value
        for name, value in state.items()
    }


def equal(own: Tensor, value: Tensor) -> bool:
    """Return whether a tensor, which may be sharded, equals a whole tensor (a collective operation)."""
    if own.shape != value.shape:
        return False
    return bool(whole((own == like(own, value.to(own))).all()))


def copy_to_host(tensor: Tensor, into: Tensor | None = None) -> Tensor:
    """Return a copy of a tensor in main memory, with the same sharding.

    Args:
        tensor: The tensor to copy.
        into: An earlier copy that is no longer needed; if it fits, it is overwritten and returned, because
            allocating new memory takes several times as long as the copy.
    """
    if into is not None and (into.shape, into.dtype) == (tensor.shape, tensor.dtype):
        local(into).copy_(local(tensor))
        return into
    return tensor.detach().to("cpu", copy=True).contiguous()


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or the whole tensor if it is not sharded, detached."""
    held = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def _shard_of(tensor: Tensor, mesh: DeviceMesh, *, copy: bool = False) -> DTensor:
    """Return a whole tensor as a sharded `DTensor`; the local shard is a view of it unless `copy` is true."""
    (rows, *_), (first, *_) = compute_local_shape_and_global_offset(tensor.shape, mesh, [Shard(0)])
    own = tensor.narrow(0, min(first, len(tensor)), rows)
    return DTensor.from_local(
        own.clone() if copy else own,
        mesh,
        [Shard(0)],
        run_check=False,
        shape=tensor.shape,
        stride=torch.empty(tensor.shape, device="meta").stride(),
    )
