"""The states of all heads for one block of tokens, with the work that they share done once.

Heads are bodies of one layer. What a body does before its layer, masks and rotary angles, depends on places
only, and for a few tokens it takes about as long as the layer itself. So the trunk runs as it is, and what
one of its layers was called with is handed to the layers of the heads: to head 1's, and to those of the
drafting heads, which are called as one.

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
class AllHeads:
    """A policy's heads, made ready to decode while its parameters stay as they are.

    Attributes:
        policy: Whose trunk and heads.
        drafts: D, how many of heads 2, 3, ... draft.
        shared: A layer of the trunk that is called as the heads' layers are to be; None if there is none.
        stacked: The drafting heads' layers as one; None if they are called one after the other.
    """

    policy: Policy
    drafts: int
    shared: nn.Module | None
    stacked: nn.Module | None

    @classmethod
    def of(cls, policy: Policy, *, drafts: int) -> AllHeads:
        """Return those of a policy."""
        shared = _shared_layer(policy)
        stackable = shared is not None and drafts > 1 and policy.config.model_type not in READS_MASK
        stacked = stack([policy.heads.layer(k) for k in range(2, drafts + 2)]) if stackable else None
        return cls(policy=policy, drafts=drafts, shared=shared, stacked=stacked)

    def new_caches(self) -> PolicyCache:
        """Return empty caches; drafting heads that are called as one have one."""
        caches = self.policy.new_caches()
        return caches if self.stacked is None else PolicyCache(trunk=caches.trunk, heads=caches.heads[:2])

    def keep(self, cache: PolicyCache, index_R: Tensor, *, rows: int) -> None:
        """Keep these of so many rows of caches, in place."""
        cache.trunk.batch_select_indices(index_R)
        for number, head in enumerate(cache.heads):
            grouped = self.stacked is not None and number == 1
            groups = self.drafts if grouped else 1
            head.batch_select_indices(of_each_group(index_R, count=groups, step=rows))

    def read(self, ids_RT: Tensor, *, position_RT: Tensor, cache: PolicyCache, seen: Tensor) -> Block:
        """Run the trunk over a block.

        Args:
            ids_RT: The block.
            position_RT: Its positions.
            cache: Extended in place.
            seen: Which slots may be looked at: bool `[R, S]`, or for each of the block's tokens as what is
                added to attention's scores, `[R, 1, T, S]`.
        """
        called: list[_Call] = []

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called.append(_Call(args=args, kwargs=kwargs))

        with (
            nullcontext()
            if self.shared is None
            else self.shared.register_forward_pre_hook(remember, with_kwargs=True)
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
            call=called[0] if called else None,
        )


@frozen(kw_only=True, eq=False)
class Block:
    """What the heads say of one block; each head is to be asked once, before the caches change.

    Every head reads the whole block, so that its cache has no gaps. States are those of `Policy.head_states`.
    """

    heads: AllHeads
    cache: PolicyCache
    hidden_RTH: Tensor
    position_RT: Tensor
    seen: Tensor
    call: _Call | None

    def first(self) -> Tensor:
        """Return head 1's states, `[R, T, H]`."""
        normed: Tensor = self.heads.policy.norm(self._outputs(1))
        return normed

    def first_at(self, place_R: Tensor) -> Tensor:
        """Return head 1's states at one place of each row, `[R, 1, H]`."""
        normed: Tensor = self.heads.policy.norm(self._outputs_at(1, self._index(place_R))[:, None])
        return normed

    def drafting(self, place_R: Tensor) -> Tensor:
        """Return the drafting heads' states at one place of each row, `[R, D, H]`."""
        index_R = self._index(place_R)
        if self.heads.stacked is not None and self.call is not None:
            found = self._together(self.heads.stacked, self.call, index_R)
        else:
            heads = range(2, self.heads.drafts + 2)
            found = torch.stack([self._outputs_at(k, index_R) for k in heads], dim=1)
        normed: Tensor = self.heads.policy.norm(found)
        return normed

    def _index(self, place_R: Tensor) -> Tensor:
        """Return places of rows as an index into `[R, T]`, flattened."""
        rows, width = self.position_RT.shape
        return torch.arange(0, rows * width, width, device=place_R.device) + place_R

    def _outputs_at(self, k: int, index_R: Tensor) -> Tensor:
        """Return head k's states before the final norm, `[R, H]`."""
        with self.heads.policy.one_position_per_row(k, index_R):
            return self._outputs(k).flatten(0, 1).index_select(0, index_R)

    def _outputs(self, k: int) -> Tensor:
        """Return head k's states before the final norm, `[R, T, H]`."""
        policy = self.heads.policy
        own = self.cache.heads[k - 1] if self.cache.heads else None
        if self.call is None:
            return policy.head_outputs(
                k, self.hidden_RTH, position_BT=self.position_RT, cache=own, seen_BS=self.seen
            )
        return self.call.again(policy.heads.layer(k), self.hidden_RTH, instead_of=self.cache.trunk, cache=own)

    def _together(self, stacked: nn.Module, call: _Call, index_R: Tensor) -> Tensor:
        """Return the drafting heads' states before the final norm, `[R, D, H]`, from one call."""
        heads, (rows, width) = self.heads.drafts, self.position_RT.shape
        index_X = of_each_group(index_R, count=heads, step=rows * width)
        with one_position_per_row(stacked, index_X):
            output_XTH = call.for_groups(heads, rows=rows).again(
                stacked,
                of_groups(self.hidden_RTH, heads),
                instead_of=self.cache.trunk,
                cache=self.cache.heads[1],
            )
        output_XH = output_XTH.flatten(0, 1).index_select(0, index_X)
        return output_XH.view(heads, rows, -1).transpose(0, 1)


def of_groups(value_RX: Tensor, count: int) -> Tensor:
    """Return so many groups of rows that are all alike, `[count R, ...]`; of one row, without copying it."""
    return value_RX.expand(count, *value_RX.shape).flatten(0, 1)


def of_each_group(index_R: Tensor, *, count: int, step: int) -> Tensor:
    """Return an index into one of `count` groups of `step` things as one into each of them, `[count R]`."""
    start_D = torch.arange(0, count * step, step, device=index_R.device)
    return (start_D[:, None] + index_R).flatten()


@frozen(kw_only=True, eq=False)
class _Call:
    """What a layer was called with; the states come first."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def for_groups(self, count: int, *, rows: int) -> _Call:
        """Return the call for so many groups of rows that all look at the same."""

        def repeated(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(repeated, value))
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows:
                return of_groups(value, count)
            return value

        named = {name: repeated(value) for name, value in self.kwargs.items()}
        return _Call(args=tuple(map(repeated, self.args)), kwargs=named)

    def again(self, layer: nn.Module, hidden: Tensor, *, instead_of: Any, cache: Any) -> Tensor:
        """Call another layer like this, with other states and another cache."""
        rest = [cache if value is instead_of else value for value in self.args[1:]]
        named = {name: cache if value is instead_of else value for name, value in self.kwargs.items()}
        found = layer(hidden, *rest, **named)
        states: Tensor = found[0] if isinstance(found, tuple) else found
        return states


def _shared_layer(policy: Policy) -> nn.Module | None:
    """Return a layer of the trunk that looks at what the heads' layers look at, all of it or a window."""
    if policy.head_kind == "linear":
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
