"""What this package relies on in transformers' families of models, Llama or GPT-2 for example.

A causal LM is a body (embeddings, decoder layers, a final norm) and an unembedding. The trunk is a body, and
so is each `parallel` head, a body of one layer.

Shape letters: B rows, T positions, S cached and new tokens, H hidden.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from weighted_mtp_core.errors import WmtpError

READS_MASK = frozenset({"bloom", "falcon", "mpt"})
"""`model_type` of families with ALiBi, which read distances from the attention mask itself."""


COUNTS_SLOTS = frozenset({"gpt_neo", "mpt"})
"""`model_type` of families that measure distances in slots of the cache, which refused drafts stretch."""

LIMITED_LENGTH = frozenset({"gpt_neo", "mpt"})
"""`model_type` of families with a causal mask or biases of `max_position_embeddings` tokens and no more."""

REFUSED = {
    "rwkv": "it rescales its own weights whenever it passes from training to evaluation",
}
"""`model_type` of families that cannot be a trunk although their forward pass can, with the reason."""

SCALES_OF_EMBEDDINGS = ("embedding_multiplier", "embed_scale")
"""Attributes by which some bodies multiply embeddings, and would multiply what a head's body reads."""

_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def text_config(config: Any) -> Any:
    """Return the config of a model's text decoder; of a model for text alone, its config."""
    return config.get_text_config(decoder=True)


def logit_forms(config: Any) -> Iterator[tuple[float, float | None]]:
    """Yield scale and soft-cap of the unembedding as a config may mean them, the likeliest first.

    Some families share the name of an option but do not read it, so what a config says is compared with the
    model itself.
    """
    config = text_config(config)

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, int | float) and value > 0 else None

    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= number(name) or 1.0
    for name in _DIVISORS:
        scale /= number(name) or 1.0
    cap = next((value for name in _SOFT_CAPS if (value := number(name)) is not None), None)
    yield from dict.fromkeys([(scale, cap), (1.0, cap), (scale, None), (1.0, None)])


def body_of(base: Any) -> Any:
    """Return the body of a causal LM, whose last hidden states the unembedding reads."""
    body = base.base_model
    if body is base:  # Llama 4 names its body differently than its own class says
        body = getattr(base, "model", base)
    children = dict(body.named_children())
    if "decoder" in children and not any(isinstance(child, nn.ModuleList) for child in children.values()):
        return children["decoder"]  # OPT wraps it
    return body


def anatomy(base: Any) -> tuple[Any, str, str]:
    """Return the body of a causal LM and the names of its layers and of its final norm.

    Raises:
        WmtpError: It is not built of layers and a final norm.
    """
    body = body_of(base)
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


def with_layers(config: Any, layers: slice) -> Any:
    """Return a copy of a model's config for some of its layers.

    Raises:
        WmtpError: The config derives the kinds of its layers from their numbers.
    """
    count = config.num_hidden_layers
    numbers = range(count)[layers]
    smaller = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == count and _one_for_each_layer(name):
            setattr(smaller, name, type(value)(value[number] for number in numbers))
    smaller.num_hidden_layers = len(numbers)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and list(smaller.layer_types) != [kinds[number] for number in numbers]:
        raise WmtpError(
            f"the layers of a `{config.model_type}` model are numbered in its config, "
            "so the last one cannot be taken off",
            hint='set `model.heads.kind = "medusa"`',
        )
    return smaller


def _one_for_each_layer(name: str) -> bool:
    return "layer" in name or "pattern" in name


def body_states(
    body: nn.Module, *, position_BT: Tensor | None, cache: Any, seen_BS: Tensor | None, **inputs: Tensor
) -> Tensor:
    """Return the last hidden states `[B, T, H]` of a body.

    Args:
        body: The body.
        position_BT: Positions, if they are not 0, 1, ... or the cache's continuation.
        cache: Of `new_cache`, extended in place; None computes without one.
        seen_BS: bool, the tokens that may be attended to; None means all.
        inputs: `input_ids` or `inputs_embeds`.
    """
    # Given neither cache nor positions, transformers searches the positions that it has just made for packed
    # documents, and waits for the accelerator once a forward pass and body.
    if cache is None and position_BT is None and cache_kinds(body) <= KEYS_AND_VALUES:
        cache_or_none = _empty_cache()
    else:
        cache_or_none = cache
    if seen_BS is not None and seen_BS.dtype == torch.bool:
        seen_BS = seen_BS.long()  # as tokenizers make masks: some families calculate with them
    optional = {
        "attention_mask": seen_BS,
        "position_ids": position_BT,
        "past_key_values": cache_or_none,
    }
    kind: Any = type(body)
    accepted = _arguments(kind)
    given = {name: value for name, value in optional.items() if value is not None or name in accepted}
    states: Tensor = body(**given, use_cache=cache is not None, **inputs).last_hidden_state
    return states


@functools.cache
def _arguments(body: Any) -> frozenset[str]:
    """Return the names of what a body's forward pass takes."""
    return frozenset(inspect.signature(body.forward).parameters)


def new_cache(config: Any) -> Any:
    """Return an empty cache for a model's layers, a transformers `DynamicCache`."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


def one_layer_cache(config: Any) -> Any:
    """Return an empty cache for a model's last layer alone, as its layer 0."""
    cache = new_cache(config)
    cache.layers = cache.layers[-1:]
    return cache


def cache_kinds(body: Any) -> frozenset[str]:
    """Return the classes of transformers that cache a body's layers, by name; looked up once a body."""
    known = _CACHE_KINDS.get(body)
    if known is None:
        try:
            known = frozenset(type(layer).__name__ for layer in new_cache(body.config).layers)
        except (KeyError, ValueError, AttributeError):  # layers of a kind that only their own model makes
            known = frozenset({"unknown"})
        _CACHE_KINDS[body] = known
    return known


KEYS_AND_VALUES = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer"})
"""`cache_kinds` of layers of attention alone."""

_CACHE_KINDS: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


@functools.cache
def _empty_cache() -> Any:
    from transformers import DynamicCache

    class EmptyCache(DynamicCache):  # type: ignore[misc] # transformers gives it no type
        """Stores nothing."""

        def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return key, value

    return EmptyCache()
