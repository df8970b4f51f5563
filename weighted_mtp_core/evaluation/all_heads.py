"""The states of all heads for one block of tokens, with the work that they share done once.

Heads are bodies of one layer. What a body does before its layer, masks and rotary angles, depends on places
only, and for a few tokens it takes about as long as the layer itself. So head 1 runs as it is, and what its
layer was called with is handed to the layers of the others.

Shape letters: R rows, T tokens of a block, S slots of the caches, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from weighted_mtp_core.model.policy import Policy, PolicyCache


def first_head_states(
    policy: Policy, hidden_RTH: Tensor, *, position_RT: Tensor, cache: PolicyCache, seen_RS: Tensor
) -> tuple[Tensor, Callable[[], list[Tensor]]]:
    """Return what head 1 hands to the unembedding, `[R, T, H]`, and what gives that of the others.

    The others are to be asked once, before the caches change; what they say is that of `Policy.head_states`.
    """
    if policy.head_kind == "linear":
        return hidden_RTH, lambda: [policy.head_states(k, hidden_RTH) for k in range(2, policy.n_future + 1)]
    called: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.append((args, kwargs))

    layers = [_layer_of(head) for head in policy.heads]
    hook = layers[0].register_forward_pre_hook(remember, with_kwargs=True)
    try:
        first = policy.head_states(
            1, hidden_RTH, position_BT=position_RT, cache=cache.heads[0], seen_BS=seen_RS
        )
    finally:
        hook.remove()
    ((args, kwargs),) = called

    def others() -> list[Tensor]:
        states = []
        for layer, own in zip(layers[1:], cache.heads[1:], strict=True):
            mine = [own if value is cache.heads[0] else value for value in args]
            named = {name: own if value is cache.heads[0] else value for name, value in kwargs.items()}
            found = layer(*mine, **named)
            states.append(policy.norm(found[0] if isinstance(found, tuple) else found))
        return states

    return first, others


def _layer_of(head: nn.Module) -> nn.Module:
    (layers,) = (child for child in head.children() if isinstance(child, nn.ModuleList))
    (layer,) = layers
    return layer
