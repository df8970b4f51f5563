"""Computes how many bytes of the policy's parameters a process holds and gathers with `model.shard`."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import frozen
from torch import nn

from weighted_mtp_core.memory.parts import Target
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.runtime.sharding import decoder_layers


@frozen(kw_only=True, eq=False)
class Shards:
    """The division of a policy over processes, see `runtime.fsdp`.

    Attributes:
        policy: The policy; its simulated parameters are not sharded.
        target: Contains the number of processes and the dtype of forward passes.
        exist: Whether parameters are sharded at all.
        adapters: The results of `id` for the parameters of adapters, which are whole in each process.
    """

    policy: Policy
    target: Target
    exist: bool
    adapters: frozenset[int]

    @classmethod
    def of(cls, policy: Policy, target: Target, *, wanted: bool) -> Shards:
        """Return the division of a policy; `wanted` is the recipe's `model.shard`."""
        adapters = frozenset(id(each) for name, each in policy.named_parameters() if "lora_" in name)
        return cls(policy=policy, target=target, exist=wanted and target.processes > 1, adapters=adapters)

    def kept(self, parameters: Iterable[nn.Parameter]) -> float:
        """Return the share of the parameters' bytes that one process holds."""
        wanted = list(parameters)
        if not self.exist or not wanted:
            return 1.0
        split = sum(each.nbytes for each in wanted if self._is_split(each))
        return 1 - (1 - 1 / self.target.processes) * split / sum(each.nbytes for each in wanted)

    def gathered(self, *, trains: bool) -> int:
        """Return the bytes of gathered matrices: the unembedding with its gradient, and two layers.

        Two layers are gathered at a time, because the next layer is received while a layer is computed. If
        `trains` is true, the whole gradient of one layer also exists, in float32, until it is summed over the
        processes.
        """
        if not self.exist:
            return 0
        layers = [
            sum(each.numel() for each in block.parameters() if self._is_split(each))
            for block in decoder_layers(self.policy)
        ]
        per_number = 2 * self.target.dtype.itemsize + (4 if trains else 0)
        return 2 * 4 * self.policy.unembedding.weight.numel() + per_number * max(layers, default=0)

    def _is_split(self, parameter: nn.Parameter) -> bool:
        """Return whether a parameter is sharded: all matrices are, except the matrices of adapters."""
        return parameter.ndim >= 2 and id(parameter) not in self.adapters
