"""Steps an optimiser one parameter at a time on copies, which are discarded if the step is to be skipped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weighted_mtp_core.runtime.sharding import like, local, shard_like, whole


class OneByOne(torch.optim.Optimizer, ABC):
    """An optimiser of parameters that are updated one after the other, each by torch's or a package's code.

    That code supports neither skipped steps nor sharded parameters. So it gets a copy of each parameter, and
    the result is written back, unless `found_inf` is 1, without a wait for the device. The copies take the
    memory of one parameter.

    Attributes:
        needs_whole: Whether the update of an element depends on all elements. Each process then computes the
            update of the whole parameter; otherwise it computes the update of its own shard.
        found_inf: A tensor on the device, 1 if the next step is to be skipped and 0 otherwise; None for 0.
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
        """Update a parameter, which is not sharded, by its gradient, and return its new state.

        Args:
            parameter: A copy of the parameter or of its shard, changed in place.
            state: The parameter's state, which may be changed in place; empty before its first step.
            group: The parameter's group, with `lr` and `weight_decay`.
            original: The parameter of the model, which may be sharded.
        """

    def adopt(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the whole state of a checkpoint as this optimiser would hold it for the parameter."""
        del parameter
        return state

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override] # no closure
        """Take one step, or none if `found_inf` is 1."""
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
        """Return a new tensor of the state, computed by `update`, as sharded as the parameter."""
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
