"""Optimisers that update one parameter at a time, on a copy that is discarded if the step is skipped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weighted_mtp_core.runtime.sharding import like, local, shard_like, whole


class OneByOne(torch.optim.Optimizer, ABC):
    """An optimiser that updates parameters one after the other, with code of torch or of another package.

    The code of torch or of the other package supports neither skipped steps nor sharded parameters. Therefore
    a parameter and its state are updated on copies, which are written back unless `found_inf` is 1; the host
    does not wait for the device. At any time, only one parameter and its state have copies.

    Attributes:
        needs_whole: Whether each process updates whole parameters, because the update of an element depends
            on all elements of its parameter. Otherwise, each process updates its own shards.
        found_inf: A tensor on the device, 1 if the next step is to be skipped and 0 otherwise; None means 0.
    """

    needs_whole: bool
    found_inf: Tensor | None = None

    @abstractmethod
    def update(
        self,
        parameter: nn.Parameter,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
        *,
        original: nn.Parameter,
    ) -> Mapping[str, Tensor]:
        """Update an unsharded parameter with its gradient, and return the parameter's new state.

        Args:
            parameter: A copy of the model's parameter or of this process's shard; it is changed in place.
            state: The parameter's state, which may be changed in place; empty before its first step.
            group: The parameter's group, with `lr` and `weight_decay`.
            original: The model's parameter itself, which may be sharded.
        """

    def adopt(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Convert a parameter's unsharded state from a checkpoint into the form that this optimiser uses."""
        del parameter
        return state

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override] # no closure
        """Update all parameters that have a gradient, unless `found_inf` is 1."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: nn.Parameter, gradient: Tensor, group: Mapping[str, Any]) -> None:
        part, known = whole if self.needs_whole else local, self.state[parameter]
        copy = nn.Parameter(part(parameter).clone(memory_format=torch.contiguous_format))
        copy.grad = part(gradient)
        before = {name: part(tensor).clone() for name, tensor in known.items()}
        state = self.update(copy, before, group, original=parameter)
        self._write(parameter, copy.detach())
        for name, tensor in state.items():
            value = tensor.to(parameter.device)
            if name not in known:
                known[name] = self._sharded(torch.zeros_like(value), parameter)
            self._write(known[name], value)

    def _sharded(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return a tensor of a parameter's state, sharded like the parameter; scalars are not sharded."""
        if not isinstance(parameter, DTensor) or not value.ndim:
            return value
        if self.needs_whole:
            return shard_like(parameter, value)
        shape = parameter.shape if value.shape == local(parameter).shape else None
        stride = parameter.stride() if shape is not None else None
        return DTensor.from_local(
            value, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
        )

    def _write(self, old: Tensor, new: Tensor) -> None:
        """Overwrite a tensor, which may be sharded, with a result of `update`, unless the step is skipped."""
        mine, result = local(old), local(like(old, new)) if self.needs_whole else new
        if self.found_inf is not None:
            result = torch.where(self.found_inf > 0, mine, result)
        mine.copy_(result)
