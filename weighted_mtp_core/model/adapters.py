"""Trains low-rank adapters on a frozen base model, if `model.train = "adapters"`.

The frozen base consists of the trunk, head 1, the final norm and the unembedding; if `adapters.heads` is
`"adapted"`, the decoder layers of heads 2..K are frozen, too. `api.adapters` adds the adapters, and
`stored_base` stores the matrices of the base in `model.base_dtype`. Instead of the frozen parameters,
checkpoints contain their SHA-256.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from weighted_mtp_core.api.adapters import add_adapters
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.stored_base import restore_base, store_base
from weighted_mtp_core.recipe.schema import ModelTable
from weighted_mtp_core.runtime.fsdp import copy_of
from weighted_mtp_core.runtime.sharding import mesh_of_parameters
from weighted_mtp_core.runtime.state_digest import BASE_SHA256, state_sha256

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def adapt(policy: Policy, table: ModelTable) -> None:
    """Freeze a policy's base model, add adapters, and store the frozen matrices in `base_dtype`.

    If `adapters.heads` is `"adapted"`, the decoder layers of heads 2..K are also frozen and get adapters; all
    other parameters of heads 2..K are trained in any case. The outputs of the policy change only by the
    rounding to `base_dtype`.

    Raises:
        WmtpError: `api.adapters.add_adapters` refuses the adapters, two adapted layers share a matrix, the
            base cannot be stored in `base_dtype`, or the policy is sharded and `adapters.dora` is set.
    """
    attach(policy, table)
    base = {name: each for name, each in policy.named_parameters() if not each.requires_grad}
    digest = bytes.fromhex(state_sha256(base))
    policy.register_buffer(BASE_SHA256, torch.tensor(list(digest), dtype=torch.uint8))
    store_base(policy, table.base_dtype)


def attach(policy: Policy, table: ModelTable) -> None:
    """Add adapters and select the trained parameters; the base is neither hashed nor converted.

    Raises:
        WmtpError: `api.adapters.add_adapters` refuses the adapters, two adapted layers share a matrix, or the
            policy is sharded and `adapters.dora` is set.
    """
    options, heads = table.adapters, policy.heads
    if options.dora and mesh_of_parameters(policy) is not None:
        raise WmtpError(
            "the adapters of a sharded policy cannot have `dora`, which needs the norms of whole matrices",
            hint="set `model.adapters.dora = false`, or `model.shard = false`",
        )
    later = [heads.layer(k) for k in range(2, policy.n_future + 1)] if options.heads == "adapted" else []
    frozen = {id(parameter) for layer in later for parameter in layer.parameters()}
    whole = [parameter for parameter in policy.later_parameters() if id(parameter) not in frozen]
    add_adapters(
        policy,
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        rslora=options.rslora,
        dora=options.dora,
        targets=options.targets,
        layers=[*_decoder_layers(policy.trunk), heads.layer(1), *later],
    )
    for parameter in whole:
        parameter.requires_grad = True
    _refuse_shared_matrices(policy)


def _refuse_shared_matrices(policy: Policy) -> None:
    """Refuse adapters of two layers with one matrix, because a merged matrix can hold only one adapter."""
    owners: dict[int, str] = {}
    for name, layer in adapted_layers(policy):
        other = owners.setdefault(id(layer.get_base_layer().weight), name)
        if other != name:
            raise WmtpError(
                f"`{other}` and `{name}` share a matrix, so an export could not contain both adapters",
                hint="set `model.adapters.targets` to layers with matrices of their own, or "
                '`model.train = "all"`',
            )


def merge_adapters(module: nn.Module) -> None:
    """Merge each adapter into the float32 matrix of its layer, and make the layer an ordinary layer again."""
    restore_base(module)
    for name, layer in list(adapted_layers(module)):
        layer.merge()
        module.set_submodule(name, layer.get_base_layer())
    module._buffers.pop(BASE_SHA256, None)  # noqa: SLF001 - nn.Module has no method for it
    vars(module).pop("peft_config", None)


def merged_copy(module: AnyModule) -> AnyModule:
    """Return a copy of a module in which all adapters are merged into their layers.

    Raises:
        WmtpError: The module is sharded and has adapters.
    """
    if mesh_of_parameters(module) is not None and any(True for _ in adapted_layers(module)):
        raise WmtpError(
            "a trainable copy of the trunk cannot be made from a sharded policy with adapters",
            hint="set `model.shard = false`, or give the critic another model (`critic.options.base`)",
        )
    twin = copy_of(module)
    merge_adapters(twin)
    return twin


def adapted_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and the module of each layer with an adapter; the modules are layers of `peft`."""
    for name, each in module.named_modules():
        if hasattr(each, "base_layer") and hasattr(each, "lora_A"):
            yield name, each


def _decoder_layers(trunk: nn.Module) -> list[nn.Module]:
    return [each for module in trunk.modules() if isinstance(module, nn.ModuleList) for each in module]
