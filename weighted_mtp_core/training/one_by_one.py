"""Steps an optimiser one parameter at a time on copies, which are discarded if the step is to be skipped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weighted_mtp_core.runtime.sharding import like, local, whole


class OneByOne(torch.optim.Optimizer, ABC):
    """An optimiser of parameters that are updated one after the other, each by torch's or a package's code.

    That code knows neither skipped steps nor sharded parameters. So it gets a whole copy of each parameter,
    and the result is written back, unless `found_inf` is 1, without a wait for the device. The copies take
    the memory of one parameter. With sharded parameters, all processes compute the same step.

    Attributes:
        found_inf: A tensor on the device, 1 if the next step is to be skipped and 0 otherwise; None for 0.
    """

    found_inf: Tensor | None = None

    @abstractmethod
    def update(
        self, parameter: nn.Parameter, state: Mapping[str, Tensor], group: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        """Update a whole parameter by its gradient, and return its new state.

        Args:
            parameter: The parameter, changed in place.
            state: The parameter's state, which may be changed in place; empty before its first step.
            group: The parameter's group, with `lr` and `weight_decay`.
        """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override] # no closure
        """Take one step, or none if `found_inf` is 1."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: nn.Parameter, gradient: Tensor, group: Mapping[str, Any]) -> None:
        known = self.state[parameter]
        new = nn.Parameter(whole(parameter).clone())
        new.grad = whole(gradient)
        state = self.update(new, {name: whole(tensor).clone() for name, tensor in known.items()}, group)
        self._write(parameter, new.detach())
        for name, tensor in state.items():
            value = tensor.to(parameter.device)
            if name not in known:
                known[name] = torch.zeros_like(value)
                if value.shape == parameter.shape:
                    known[name] = like(parameter, known[name])
            self._write(known[name], value)

    def _write(self, old: Tensor, new: Tensor) -> None:
        """Overwrite a tensor, which may be sharded, with a whole tensor, unless the step is skipped."""
        mine, result = local(old), local(like(old, new))
        if self.found_inf is not None:
            result = torch.where(self.found_inf > 0, mine, result)
        mine.copy_(result)
