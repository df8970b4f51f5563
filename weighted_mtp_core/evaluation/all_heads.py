"""The states of all heads for one block of tokens, with the work that they share done once.

Heads are bodies of one layer. What a body does before its layer, masks and rotary angles, depends on places
only, and for a few tokens it takes about as long as the layer itself. So the trunk runs as it is, and what
its last layer was called with is handed to the layers of the heads.

Shape letters: R rows, T tokens of a block, S slots of the caches, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from weighted_mtp_core.model.policy import Policy, PolicyCache, layers_of


@frozen(kw_only=True, eq=False)
class AllHeads:
    """What the heads say of one block; each head is to be asked once, before the caches change.

    Every head reads the whole block, so that its cache has no gaps. States are those of `Policy.head_states`.
    """

    policy: Policy
    cache: PolicyCache
    hidden_RTH: Tensor
    position_RT: Tensor
    seen: Tensor
    call: _Call | None

    @classmethod
    def read(
        cls, policy: Policy, ids_RT: Tensor, *, position_RT: Tensor, cache: PolicyCache, seen: Tensor
    ) -> AllHeads:
        """Run the trunk over a block.

        Args:
            policy: Whose trunk and heads.
            ids_RT: The block.
            position_RT: Its positions.
            cache: Extended in place.
            seen: Which slots may be looked at: bool `[R, S]`, or for each of the block's tokens as what is
                added to attention's scores, `[R, 1, T, S]`.
        """
        shared = _shared_layer(policy)
        called: list[_Call] = []

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called.append(_Call(args=args, kwargs=kwargs))

        hook = None if shared is None else shared.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            hidden_RTH = policy.trunk_states(ids_RT, position_BT=position_RT, cache=cache.trunk, seen_BS=seen)
        finally:
            if hook is not None:
                hook.remove()
        return cls(
            policy=policy,
            cache=cache,
            hidden_RTH=hidden_RTH,
            position_RT=position_RT,
            seen=seen,
            call=called[0] if called else None,
        )

    def first(self) -> Tensor:
        """Return head 1's states, `[R, T, H]`."""
        normed: Tensor = self.policy.norm(self._outputs(1))
        return normed

    def first_at(self, place_R: Tensor) -> Tensor:
        """Return head 1's states at one place of each row, `[R, 1, H]`."""
        return self._at(place_R, heads=[1])

    def drafting(self, count: int, place_R: Tensor) -> Tensor:
        """Return the states of the first `count` drafting heads at one place of each row, `[R, D, H]`."""
        return self._at(place_R, heads=range(2, count + 2))

    def _at(self, place_R: Tensor, *, heads: Iterable[int]) -> Tensor:
        rows, width = self.position_RT.shape
        index_R = torch.arange(0, rows * width, width, device=place_R.device) + place_R
        outputs = []
        for k in heads:
            with self.policy.asked_in_each_row(k, index_R):
                outputs.append(self._outputs(k).flatten(0, 1).index_select(0, index_R))
        normed: Tensor = self.policy.norm(torch.stack(outputs, dim=1))
        return normed

    def _outputs(self, k: int) -> Tensor:
        """Return head k's states before the final norm, `[R, T, H]`."""
        own = self.cache.heads[k - 1] if self.cache.heads else None
        if self.call is None:
            return self.policy.head_outputs(
                k, self.hidden_RTH, position_BT=self.position_RT, cache=own, seen_BS=self.seen
            )
        (layer,) = layers_of(self.policy.heads[k - 1])
        return self.call.again(layer, self.hidden_RTH, instead_of=self.cache.trunk, cache=own)


@frozen(kw_only=True, eq=False)
class _Call:
    """What a layer was called with; the states come first."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

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
