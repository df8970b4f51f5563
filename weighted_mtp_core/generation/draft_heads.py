"""Run all heads on one block of tokens and do their common work only once.

Each `parallel` head is a body of one layer. Before its layer, a body computes masks and rotary angles, which
depend only on positions. For a few tokens, computing masks and angles takes about as long as the layer
itself. Masks and angles are therefore computed only once: the layers of the heads are called with the
arguments of a layer of the trunk. If possible, the layers of heads 2, 3, ..., which draft, are stacked and
called as one layer.

Shape letters: R rows, T tokens of a block, S slots of the caches, D drafting heads, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from weighted_mtp_core.generation.stacked_layers import stack
from weighted_mtp_core.model.families import READS_MASK, layers_of
from weighted_mtp_core.model.policy import Policy, PolicyCache
from weighted_mtp_core.model.sparse_feed_forward import one_position_per_row


@frozen(kw_only=True, eq=False)
class DecodingHeads:
    """A policy's heads, prepared for decoding; the policy's parameters must not change during decoding.

    Attributes:
        policy: The policy.
        drafts: D, the number of heads 2, 3, ... that draft.
        shared: A layer of the trunk whose arguments also fit the heads' layers; None if there is no such
            layer, or if the heads are not `parallel` heads.
        stacked: The layers of the drafting heads as one module; None if these layers are not stacked.
    """

    policy: Policy
    drafts: int
    shared: nn.Module | None
    stacked: nn.Module | None

    @classmethod
    def of(cls, policy: Policy, *, drafts: int) -> DecodingHeads:
        """Prepare a policy's heads for decoding."""
        shared = _shared_layer(policy)
        stackable = shared is not None and drafts > 1 and policy.config.model_type not in READS_MASK
        stacked = stack([policy.heads.layer(k) for k in range(2, drafts + 2)]) if stackable else None
        return cls(policy=policy, drafts=drafts, shared=shared, stacked=stacked)

    def new_caches(self) -> PolicyCache:
        """Return empty caches; stacked drafting heads share one cache."""
        caches = self.policy.new_caches()
        return caches if self.stacked is None else PolicyCache(trunk=caches.trunk, heads=caches.heads[:2])

    def keep(self, cache: PolicyCache, index_R: Tensor, *, rows: int) -> None:
        """Keep, in place, only the rows `index_R` of caches that have `rows` rows."""
        cache.trunk.reorder_cache(index_R)
        for number, head in enumerate(cache.heads):
            groups = self.drafts if self.stacked is not None and number == 1 else 1
            head.reorder_cache(_in_each_group(index_R, count=groups, size=rows))

    def read(self, ids_RT: Tensor, *, position_RT: Tensor, cache: PolicyCache, seen: Tensor) -> Block:
        """Run the trunk on a block of tokens.

        Args:
            ids_RT: Token ids of the block, int64.
            position_RT: int64 positions of the block's tokens.
            cache: The caches, which are extended in place.
            seen: The slots that may be attended to: bool `[R, S]`, or a float mask `[R, 1, T, S]` that is
                added to the attention scores of each token of the block.
        """
        calls: list[_Call] = []

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(_Call(args=args, kwargs=kwargs))

        with (
            nullcontext()
            if self.shared is None
            else self.shared.register_forward_pre_hook(record, with_kwargs=True)
        ):
            hidden_RTH = self.policy.trunk_states(
                ids_RT, position_BT=position_RT, cache=cache.trunk, seen_BS=seen
            )
        return Block(
            heads=self,
            cache=cache,
            hidden_RTH=hidden_RTH,
            position_RT=position_RT,
            seen=seen,
            call=calls[0] if calls else None,
        )


@frozen(kw_only=True, eq=False)
class Block:
    """The heads' states for one block of tokens.

    The states of a head must be computed only once, before the caches change. Every head reads the whole
    block, so that its cache has no gaps. The states equal the result of `Policy.head_states`.
    """

    heads: DecodingHeads
    cache: PolicyCache
    hidden_RTH: Tensor
    position_RT: Tensor
    seen: Tensor
    call: _Call | None

    def head_1(self) -> Tensor:
        """Return head 1's states, `[R, T, H]`."""
        normed: Tensor = self.heads.policy.norm(self._outputs(1))
        return normed

    def head_1_at(self, position_R: Tensor) -> Tensor:
        """Return head 1's state at one position of each row, `[R, 1, H]`."""
        normed: Tensor = self.heads.policy.norm(self._outputs_at(1, self._flat_index(position_R))[:, None])
        return normed

    def drafting_heads_at(self, position_R: Tensor) -> Tensor:
        """Return the drafting heads' states at one position of each row, `[R, D, H]`."""
        index_R = self._flat_index(position_R)
        if self.heads.stacked is not None and self.call is not None:
            states = self._stacked_outputs(self.heads.stacked, self.call, index_R)
        else:
            heads = range(2, self.heads.drafts + 2)
            states = torch.stack([self._outputs_at(k, index_R) for k in heads], dim=1)
        normed: Tensor = self.heads.policy.norm(states)
        return normed

    def _flat_index(self, position_R: Tensor) -> Tensor:
        """Convert one position per row to indices into the flattened `[R, T]`."""
        rows, width = self.position_RT.shape
        return torch.arange(0, rows * width, width, device=position_R.device) + position_R

    def _outputs_at(self, k: int, index_R: Tensor) -> Tensor:
        """Return head k's states before the final norm, `[R, H]`."""
        with one_position_per_row(self.heads.policy.heads.layer(k), index_R):
            return self._outputs(k).flatten(0, 1).index_select(0, index_R)

    def _outputs(self, k: int) -> Tensor:
        """Return head k's states before the final norm, `[R, T, H]`."""
        policy = self.heads.policy
        own = self.cache.heads[k - 1] if self.cache.heads and not policy.heads.chained else None
        if self.call is None:
            return policy.heads.run(
                k, self.hidden_RTH, position_BT=self.position_RT, cache=own, seen_BS=self.seen
            )
        return self.call.repeat(
            policy.heads.layer(k), self.hidden_RTH, instead_of=self.cache.trunk, cache=own
        )

    def _stacked_outputs(self, stacked: nn.Module, call: _Call, index_R: Tensor) -> Tensor:
        """Return the drafting heads' states before the final norm, `[R, D, H]`, from one call."""
        heads, (rows, width) = self.heads.drafts, self.position_RT.shape
        index_X = _in_each_group(index_R, count=heads, size=rows * width)
        with one_position_per_row(stacked, index_X):
            output_XTH = call.for_groups(heads, rows=rows).repeat(
                stacked,
                _copies(self.hidden_RTH, heads),
                instead_of=self.cache.trunk,
                cache=self.cache.heads[1],
            )
        output_XH = output_XTH.flatten(0, 1).index_select(0, index_X)
        return output_XH.view(heads, rows, -1).transpose(0, 1)


def _copies(value_RX: Tensor, count: int) -> Tensor:
    """Return the rows `count` times, `[count R, ...]`; if there is only one row, no memory is copied."""
    return value_RX.expand(count, *value_RX.shape).flatten(0, 1)


def _in_each_group(index_R: Tensor, *, count: int, size: int) -> Tensor:
    """Return the indices `index_R` in each of `count` consecutive groups of `size` elements, `[count R]`."""
    start_D = torch.arange(0, count * size, size, device=index_R.device)
    return (start_D[:, None] + index_R).flatten()


@frozen(kw_only=True, eq=False)
class _Call:
    """The arguments of a call of a layer; the first argument contains the states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def for_groups(self, count: int, *, rows: int) -> _Call:
        """Return the arguments repeated for `count` groups of `rows` rows."""

        def grouped(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(grouped, value))
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows:
                return _copies(value, count)
            return value

        kwargs = {name: grouped(value) for name, value in self.kwargs.items()}
        return _Call(args=tuple(map(grouped, self.args)), kwargs=kwargs)

    def repeat(self, layer: nn.Module, hidden: Tensor, *, instead_of: Any, cache: Any) -> Tensor:
        """Call another layer with the same arguments, but with other states and another cache."""
        args = [cache if value is instead_of else value for value in self.args[1:]]
        kwargs = {name: cache if value is instead_of else value for name, value in self.kwargs.items()}
        output = layer(hidden, *args, **kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states


def _shared_layer(policy: Policy) -> nn.Module | None:
    """Return a trunk layer with the kind of attention of `parallel` heads.

    The result is None for other kinds of heads, or if the trunk has no such layer.
    """
    if not policy.heads.bodies or policy.heads.chained:
        return None
    layers = layers_of(policy.trunk)
    trunk: Any = policy.trunk
    head: Any = policy.heads[0]
    kinds = getattr(trunk.config, "layer_types", None)
    if kinds is None:
        return layers[-1]
    (kind,) = head.config.layer_types
    alike = [layer for layer, own in zip(layers, kinds, strict=True) if own == kind]
    return alike[-1] if alike else None
