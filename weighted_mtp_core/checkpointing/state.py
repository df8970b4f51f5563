"""Copies the state of modules, optimisers and random generators as tensors and plain values, and restores it.

`snapshot.py` writes these tensors and values to files, and reads them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.runtime.sharding import copy_to_host, like, shard_like
from weighted_mtp_core.runtime.state_digest import BASE_SHA256


class WithPrefix(Mapping[str, Any]):
    """The entries `<prefix>.<name>` of a state, with the keys `<name>`.

    Values are read from the state on access.
    """

    def __init__(self, state: Mapping[str, Any], prefix: str) -> None:
        self._state, self._start = state, f"{prefix}."

    def __getitem__(self, name: str) -> Any:
        return self._state[self._start + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._start) for name in self._state if name.startswith(self._start))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def copy_state(
    state: Mapping[str, Any], prefix: str, *, over: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return copies of a state's tensors in main memory, with the same sharding, and the plain values.

    Args:
        state: The state, with tensors and plain values.
        prefix: Text that, followed by a dot, is prepended to the name of each tensor.
        over: Earlier copies, keyed by their prefixed names; a copy of equal shape and dtype is overwritten.
    """
    found = {f"{prefix}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    tensors = {name: copy_to_host(value, over.get(name)) for name, value in found.items()}
    return tensors, {name: value for name, value in state.items() if not isinstance(value, Tensor)}


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and persistent buffers; a tensor with several names is returned once.

    If the module has the buffer `BASE_SHA256`, the result contains only this buffer and the parameters that
    are trained.
    """
    kept = module.state_dict(keep_vars=True)
    if BASE_SHA256 in kept:
        kept = {name: tensor for name, tensor in kept.items() if tensor.requires_grad or name == BASE_SHA256}
    unique = {id(tensor): name for name, tensor in reversed(kept.items())}
    return {name: tensor for name, tensor in kept.items() if unique[id(tensor)] == name}


@torch.no_grad()
def load_module_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state from `module_state` into a module; tensors are read one at a time to save memory.

    Raises:
        WmtpError: The state belongs to another module, or to adapters of another base model.
    """
    own = module_state(module)
    if own.keys() != state.keys():
        raise _another_model()
    for name, tensor in own.items():
        value = state[name]
        if value.shape != tensor.shape:
            raise _another_model()
        if name == BASE_SHA256 and not torch.equal(value, tensor.cpu()):
            raise WmtpError(
                "the checkpoint was trained on another base model: the SHA-256 of its frozen tensors differs",
                hint="restore the files of `model.base`, or start a new run",
            )
        tensor.copy_(like(tensor, value))


def _another_model() -> WmtpError:
    return WmtpError(
        "the checkpoint holds another model than the recipe describes",
        hint="use the recipe of the run that wrote it (its `recipe.toml`)",
    )


def optimiser_state(
    optimisers: Iterable[torch.optim.Optimizer], parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """Return the state of optimisers, without their options, keyed by `<index of the parameter>.<name>`."""
    return {
        f"{index}.{name}": tensor
        for optimiser in optimisers
        for index, parameter in enumerate(parameters)
        for name, tensor in optimiser.state.get(parameter, {}).items()
    }


def load_optimiser_state(
    optimisers: Iterable[torch.optim.Optimizer],
    parameters: Sequence[nn.Parameter],
    state: Mapping[str, Tensor],
) -> None:
    """Restore the result of `optimiser_state` in new optimisers.

    A parameter without a saved state gets no state. Each tensor of a state, including Adam's `step`, is
    copied to the device of its parameter. Tensors that are not scalars are sharded like their parameter.

    Raises:
        WmtpError: The state has more parameters than `parameters`, or parameters of other shapes.
    """
    owner = {
        parameter: optimiser
        for optimiser in optimisers
        for group in optimiser.param_groups
        for parameter in group["params"]
    }
    for index in dict.fromkeys(name.partition(".")[0] for name in state):
        if int(index) >= len(parameters):
            raise _another_model()
        parameter = parameters[int(index)]
        optimiser, held = owner[parameter], WithPrefix(state, index)
        adopt = getattr(optimiser, "adopt", lambda _, same: same)
        for name, tensor in adopt(parameter, held).items():
            by_block = name.endswith("_scale")  # see `EightBitAdamW.update`
            if tensor.ndim > 0 and not by_block and tensor.shape != parameter.shape:
                raise _another_model()  # torch's fused AdamW would read and write beyond the tensor
            is_shard = isinstance(parameter, DTensor) and tensor.ndim > 0
            copy = tensor.to(parameter.device, copy=not is_shard)
            optimiser.state[parameter][name] = shard_like(parameter, copy) if is_shard else copy


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of the global random generators of torch, Python and numpy: tensors and plain values.

    The generators of CUDA devices are left out if this process does not use CUDA.
    """
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # a run on the CPU does not use GPUs
        tensors |= {f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global one is meant
    values = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    return tensors, values


def restore_random_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Restore the result of `random_state`; the generators of GPUs only if the number of GPUs is the same."""
    torch.set_rng_state(tensors["rng.torch"])
    cuda = WithPrefix(tensors, "rng.cuda")
    if cuda and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all([cuda[str(i)] for i in range(len(cuda))])
    version, numbers, gauss = values["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
