"""Makes modules with sharded parameters callable (FSDP2), and copies such modules.

The parameters of a layer are gathered only while the layer is computed. Embeddings are gathered at each call.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from weighted_mtp_core.runtime.sharding import decoder_layers, mesh_of_parameters, shard_matrices, whole

Module = TypeVar("Module", bound=nn.Module)

GATHERS_ITSELF = "gathers_itself"
"""Name of the attribute that marks a module as gathering its own sharded parameters."""


def callable_(module: Module, *, dtype: torch.dtype = torch.float32) -> Module:
    """Make a module callable, in place, and return it; a module without sharded parameters stays as it is.

    Set `requires_grad` of the parameters before the first call. Gradients are summed over the processes.

    Args:
        module: A model or a part of a model.
        dtype: The dtype in which the matrices of layers are sent and computed; unless it is float32, layers
            run under autocast. Layers with packed matrices (`nf4`) do not use `dtype`: their matrices are
            sent as they are stored.
    """
    if mesh_of_parameters(module) is None:
        return module
    twin = _twin(module)
    for own, other in zip(module.modules(), twin.modules(), strict=True):
        _TWINS[own] = other
    layers = decoder_layers(module)
    inside = {id(each) for layer in layers for each in layer.modules()}
    for layer in layers:
        _call_with_fsdp(layer, dtype)
    for part in list(module.modules()):
        held = any(isinstance(each, DTensor) for each in part.parameters(recurse=False))
        if id(part) in inside or not held or hasattr(part, GATHERS_ITSELF):
            continue
        if isinstance(part, nn.Embedding):
            _gather_at_each_call(part)
        else:
            _call_with_fsdp(part, dtype)
    for body in list(module.modules()):
        _share_buffers(body)
    return module


def shard(blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard the matrices of modules and make the modules callable; skip modules that are callable already."""
    for block in blocks:
        if not isinstance(block, FSDPModule):
            shard_matrices([block], mesh)
            _call_with_fsdp(block, torch.float32)


def view_of(module: Module) -> Module:
    """Return a callable module that shares the parameters of `module`, which is not callable yet.

    A module without sharded parameters is returned itself.
    """
    return module if mesh_of_parameters(module) is None else callable_(_twin(module))


def copy_of(module: Module) -> Module:
    """Return a copy of a module with parameters of its own; shards are copied without communication.

    The copy of a module with sharded parameters is not callable.
    """
    found: Any = _TWINS.get(module, module)
    # A deep copy of a shard would copy its whole storage, which may be the storage of a whole file.
    shards = [each for each in found.parameters() if isinstance(each, DTensor)]
    memo: dict[int, Any] = {
        id(each): nn.Parameter(each.detach().clone(), requires_grad=each.requires_grad) for each in shards
    }
    copied: Module = copy.deepcopy(found, memo)
    return copied


_TWINS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
"""Maps each module that `callable_` has changed to a twin with the same parameters.

The twin can be copied, but modules of FSDP2 cannot.
"""


def _twin(module: Module) -> Module:
    """Return a copy of a module that has the same parameters and buffers."""
    return copy.deepcopy(module, {id(each): each for each in (*module.parameters(), *module.buffers())})


def _call_with_fsdp(block: nn.Module, dtype: torch.dtype) -> None:
    """Make FSDP2 gather the sharded parameters of a module for each call."""
    sharded = [
        (owner, name, parameter)
        for owner in block.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    if not sharded:
        return
    # FSDP2 shards parameters itself. So it gets empty parameters, which are replaced with existing shards.
    empty = {
        id(own): nn.Parameter(
            torch.empty(own.shape, dtype=own.dtype, device="meta"), requires_grad=own.requires_grad
        )
        for *_, own in sharded
    }
    for owner, name, parameter in sharded:
        setattr(owner, name, empty[id(parameter)])
    packed = any(not each.is_floating_point() for *_, each in sharded)  # packed bytes must not be converted
    lower = None if packed or dtype == torch.float32 else dtype
    wrapped = fully_shard(
        block,
        mesh=sharded[0][2].device_mesh,
        # Otherwise FSDP2 keeps the gathered parameters until the backward pass, because no other module of
        # FSDP2 contains this module.
        reshard_after_forward=True,
        # The states between layers keep their dtype, as under autocast.
        mp_policy=MixedPrecisionPolicy(
            param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        ignored_params={each for each in block.parameters() if not each.is_meta},
    )
    wrapped.set_gradient_divide_factor(1.0)
    wrapped.set_force_sum_reduction_for_comms(enable=True)
    for owner, name, parameter in sharded:
        setattr(owner, name, parameter)
    if lower is not None:
        block.forward = torch.autocast(sharded[0][2].device.type, dtype=lower)(block.forward)


def _share_buffers(body: nn.Module) -> None:
    """Make the layers of a model's body share FSDP2's buffers; otherwise each layer keeps its last buffer."""
    lists = [each for each in body.children() if isinstance(each, nn.ModuleList)]
    layers = [each for listed in lists for each in listed if isinstance(each, FSDPModule)]
    is_called = type(body).forward is not nn.Module.forward
    # A head has a single layer, which is also called without its body.
    if is_called and len(layers) > 1 and not isinstance(body, FSDPModule):
        mesh = mesh_of_parameters(body)
        fully_shard(body, mesh=mesh, reshard_after_forward=True, ignored_params=set(body.parameters()))


def _gather_at_each_call(module: nn.Module) -> None:
    """Make a module gather its own sharded parameters at each call, and free them after the call.

    FSDP2 would gather the parameters again in the backward pass, which is not needed for an embedding.
    """
    compute = module.forward

    def forward(*given: Any, **named: Any) -> Any:
        own: dict[str, Tensor | None] = dict(module._parameters)  # noqa: SLF001 - `setattr` refuses tensors
        gathered = {name: each if each is None else whole(each) for name, each in own.items()}
        module._parameters.update(gathered)  # type: ignore[arg-type] # noqa: SLF001
        try:
            return compute(*given, **named)
        finally:
            module._parameters.update(own)  # type: ignore[arg-type] # noqa: SLF001

    module.forward = forward
