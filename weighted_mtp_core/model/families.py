"""What this package relies on in transformers' families of models, Llama or GPT-2 for example.

A causal LM is a body (embeddings, decoder layers, a final norm) and an unembedding. The trunk is a body, and
so is each `transformer` head, a body of one layer.

Shape letters: B rows, T positions, S cached and new tokens, H hidden.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import Tensor, nn

from weighted_mtp_core.errors import WmtpError

READS_MASK = frozenset({"bloom", "falcon", "mpt"})
"""`model_type` of families with ALiBi, which read distances from the attention mask itself."""


def anatomy(base: Any) -> tuple[Any, str, str]:
    """Return the body of a causal LM and the names of its layers and of its final norm.

    Raises:
        WmtpError: It is not built of layers and a final norm.
    """
    body = base.base_model
    children = dict(body.named_children())
    layers = [name for name, child in children.items() if isinstance(child, nn.ModuleList)]
    norms = [
        name
        for name, child in children.items()
        if name not in layers and "norm" in type(child).__name__.lower()
    ]
    if len(layers) != 1 or not norms:
        raise WmtpError(
            f"a `{base.config.model_type}` model is not a stack of layers with a final norm, "
            "so it cannot be a trunk"
        )
    return body, layers[0], norms[-1]


def layers_of(body: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a body."""
    (layers,) = (child for child in body.children() if isinstance(child, nn.ModuleList))
    return layers


def with_layers(config: Any, count: int) -> Any:
    """Return a copy of a model's config for its first `count` layers; a count of 1 means the last layer."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = list(config.layer_types)[-count:] if count == 1 else config.layer_types[:count]
    return config


def body_states(
    body: nn.Module, *, position_BT: Tensor | None, cache: Any, seen_BS: Tensor | None, **inputs: Tensor
) -> Tensor:
    """Return the last hidden states `[B, T, H]` of a body.

    Args:
        body: The body.
        position_BT: Positions, if they are not 0, 1, ... or the cache's continuation.
        cache: A `DynamicCache`, extended in place; None computes without one.
        seen_BS: bool, the tokens that may be attended to; None means all.
        inputs: `input_ids` or `inputs_embeds`.
    """
    # Given neither cache nor positions, transformers searches the positions that it has just made for packed
    # documents, and waits for the accelerator once a forward pass and body.
    no_search = cache is None and position_BT is None
    states: Tensor = body(
        attention_mask=seen_BS,
        position_ids=position_BT,
        past_key_values=_empty_cache() if no_search else cache,
        use_cache=cache is not None,
        **inputs,
    ).last_hidden_state
    return states


@functools.cache
def _empty_cache() -> Any:
    from transformers import DynamicCache

    class EmptyCache(DynamicCache):  # type: ignore[misc] # transformers gives it no type
        """Stores nothing."""

        def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return key, value

    return EmptyCache()
