"""The states of all heads for one block of tokens, with the work that they share done once.

Heads are bodies of one layer. What a body does before its layer, masks and rotary angles, depends on places
only, and for a few tokens it takes about as long as the layer itself. So the trunk runs as it is, and what
its last layer was called with is handed to the layers of the heads.

Shape letters: R rows, T tokens of a block, S slots of the caches, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from attrs import frozen
from torch import Tensor, nn

from weighted_mtp_core.model.policy import Policy, PolicyCache, layers_of


def head_states_of(
    policy: Policy, ids_RT: Tensor, *, position_RT: Tensor, cache: PolicyCache, seen_RS: Tensor
) -> list[Callable[[], Tensor]]:
    """Run the trunk over a block; return what gives each head's states for the unembedding, `[R, T, H]`.

    Each is to be asked once, and before the caches change: every head reads the whole block, so that its
    cache has no gaps. What they say is that of `Policy.head_states`.
    """
    shared = _shared_layer(policy)
    called: list[_Call] = []

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.append(_Call(args=args, kwargs=kwargs))

    hook = None if shared is None else shared.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        hidden_RTH = policy.trunk_states(ids_RT, position_BT=position_RT, cache=cache.trunk, seen_BS=seen_RS)
    finally:
        if hook is not None:
            hook.remove()

    def states(k: int) -> Tensor:
        own = cache.heads[k - 1] if cache.heads else None
        if not called:
            return policy.head_states(k, hidden_RTH, position_BT=position_RT, cache=own, seen_BS=seen_RS)
        (layer,) = layers_of(policy.heads[k - 1])
        found = called[0].again(layer, hidden_RTH, instead_of=cache.trunk, cache=own)
        normed: Tensor = policy.norm(found)
        return normed

    return [partial(states, k) for k in range(1, policy.n_future + 1)]


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
