"""Properties of transformers' model families (such as Llama and GPT-2) on which this package relies.

A causal LM consists of a body (embeddings, decoder layers, a final norm) and an unembedding. The trunk is the
body; with `parallel` heads, its last layer and its final norm are removed, and with some `sequential` heads,
its final norm is removed. Each `parallel` head is a copy of the body that has one layer and neither
embeddings nor a final norm.

Shape letters: B rows, T positions, S cached and new tokens, H hidden.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from weighted_mtp_core.errors import WmtpError

READS_MASK = frozenset({"bloom", "falcon", "mpt"})
"""`model_type` of families with ALiBi that need a boolean attention mask.

BLOOM and Falcon compute the distances between tokens from the mask, and MPT converts every mask to booleans.
"""

COUNTS_SLOTS = frozenset({"gpt_neo", "mpt"})
"""`model_type` of families that measure the distance between tokens in cache slots.

Rejected drafts keep their cache slots, so a family that measures distances in slots cannot use drafts.
"""

LIMITED_LENGTH = frozenset({"gpt_neo", "mpt"})
"""`model_type` of families whose causal mask or biases end after `max_position_embeddings` tokens."""

REFUSED = {
    "rwkv": "it rescales its own weights whenever it changes from training to evaluation mode",
}
"""By `model_type`: the reason why a family cannot be a trunk although its forward pass works."""

SCALES_OF_EMBEDDINGS = ("embedding_multiplier", "embed_scale")
"""Attributes with a factor for embeddings, which the body of a head would apply to the trunk's states."""

_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def text_config(config: Any) -> Any:
    """Return the config of a model's text decoder; for a text-only model, this is `config` itself."""
    return config.get_text_config(decoder=True)


def logit_forms(config: Any) -> Iterator[tuple[float, float | None]]:
    """Yield the pairs (logit scale, soft-cap or None) that a config can mean, the likeliest pair first.

    Some families ignore an option of their own config, so the caller must compare each pair with the logits
    of the model.
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
    """Return the body of a causal LM, whose last hidden states the unembedding reads.

    If the LM has no separate body, the LM itself is returned.
    """
    body = base.base_model
    if body is base:  # Llama 4's class names an attribute that does not exist; its body is in `model`
        body = getattr(base, "model", base)
    children = dict(body.named_children())
    if "decoder" in children and not any(isinstance(child, nn.ModuleList) for child in children.values()):
        return children["decoder"]  # OPT wraps its decoder in another module
    return body


def anatomy(base: Any) -> tuple[Any, str, str]:
    """Return the body of a causal LM, and the names of the body's list of layers and of its final norm.

    Raises:
        WmtpError: The body does not consist of layers and a final norm.
    """
    body = body_of(base)
    width = base.get_output_embeddings().weight.shape[1]
    children = dict(body.named_children())
    layers = [name for name, child in children.items() if isinstance(child, nn.ModuleList)]
    norms = [
        name
        for name, child in children.items()
        if name not in layers
        and "norm" in type(child).__name__.lower()
        and all(parameter.shape[-1] == width for parameter in child.parameters())
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
    """Return a copy of a model's config that describes only some of the model's layers.

    Raises:
        WmtpError: The config derives the kind of each layer from the number of the layer.
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
            "so its last layer cannot be removed",
            hint='set `model.heads.kind = "medusa"`',
        )
    return smaller


def more_layers(config: Any, count: int) -> dict[str, Any]:
    """Return the config keys, with values, that add `count` MTP layers after a model's decoder layers.

    An MTP layer attends to all earlier tokens unless `mtp_layer_types` specifies another kind of layer.

    Raises:
        WmtpError: The MTP layers are of another kind than the model's last layer.
    """
    layers = config.num_hidden_layers
    found = {
        name: [*value, *[value[-1]] * count]
        for name, value in vars(config).items()
        if isinstance(value, list | tuple)
        and len(value) == layers
        and _one_for_each_layer(name)
        and not name.startswith("mtp_")
    }
    kinds = getattr(config, "mtp_layer_types", None) or ["full_attention"] * count
    if "layer_types" in found and found["layer_types"][layers:] != kinds:
        raise WmtpError(
            f"the MTP layers of this `{config.model_type}` model cannot be trained: they are of the kind "
            f"`{kinds[0]}`, its last layer is of the kind `{config.layer_types[-1]}`",
            hint='set `model.heads.init = "new"`',
        )
    return {**found, "num_hidden_layers": layers + count}


def _one_for_each_layer(name: str) -> bool:
    return "layer" in name or "pattern" in name


def body_states(
    body: nn.Module, *, position_BT: Tensor | None, cache: Any, seen_BS: Tensor | None, **inputs: Tensor
) -> Tensor:
    """Return the last hidden states `[B, T, H]` of a body.

    Args:
        body: The body.
        position_BT: int64 positions; None means 0, 1, ... or, with a cache, the positions after the cached
            tokens.
        cache: A cache, for example from `new_cache`, which is extended in place; None computes without a
            cache.
        seen_BS: bool `[B, S]`, True for cached and new tokens that may be attended to, or a float mask
            `[B, 1, T, S]` that is added to attention scores; None means all tokens.
        inputs: Either `input_ids`, int64 `[B, T]`, or `inputs_embeds`, `[B, T, H]`.
    """
    # Without a cache and positions, transformers would create positions and search them for packed documents,
    # which synchronises with the accelerator in each forward pass of each body.
    if cache is None and position_BT is None and cache_kinds(body) <= KEYS_AND_VALUES:
        cache_or_none = _empty_cache()
    else:
        cache_or_none = cache
    if seen_BS is not None and seen_BS.dtype == torch.bool:
        seen_BS = seen_BS.long()  # integers like a tokenizer's masks: some families do arithmetic with masks
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
    """Return the names of the arguments of a body's forward pass."""
    return frozenset(inspect.signature(body.forward).parameters)


def new_cache(config: Any) -> Any:
    """Return an empty cache for a model's layers, a transformers `DynamicCache`."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


def one_layer_cache(config: Any) -> Any:
    """Return an empty cache for only the last layer of a model, which becomes layer 0 of the cache."""
    cache = new_cache(config)
    cache.layers = cache.layers[-1:]
    return cache


def cache_kinds(body: Any) -> frozenset[str]:
    """Return the names of the transformers classes that cache a body's layers, computed once per body.

    If transformers cannot derive the classes from the config of the body, the only name is `unknown`.
    """
    known = _CACHE_KINDS.get(body)
    if known is None:
        try:
            known = frozenset(type(layer).__name__ for layer in new_cache(body.config).layers)
        except (
            KeyError,
            ValueError,
            AttributeError,
        ):  # only the model itself can create the caches of its layers
            known = frozenset({"unknown"})
        _CACHE_KINDS[body] = known
    return known


KEYS_AND_VALUES = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer"})
"""The names that `cache_kinds` can contain for bodies in which every layer is an attention layer."""

_CACHE_KINDS: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


@functools.cache
def _empty_cache() -> Any:
    from transformers import DynamicCache

    class EmptyCache(DynamicCache):  # type: ignore[misc] # transformers gives it no type
        """A cache that stores nothing."""

        def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return key, value

    return EmptyCache()


def recording_cache(past: Sequence[Tensor]) -> Any:
    """Return a cache that records the keys and values of one call of a body of one layer.

    Args:
        past: Keys and values of earlier calls in the order key, value, key, value, ...; each tensor is
            `[B, heads, S, width]`.

    Returns:
        A transformers cache. After the call, the cache's attribute `new` is the pair of new keys and values.
    """
    return _recording_cache_class()(past)


@functools.cache
def _recording_cache_class() -> Any:
    class RecordingCache(type(_empty_cache())):  # type: ignore[misc] # transformers gives it no type
        """A cache that keeps the autograd graph of keys and values."""

        def __init__(self, past: Sequence[Tensor]) -> None:
            super().__init__()
            self.past = past
            self.new: tuple[Tensor, ...] = ()

        def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.new = key, value
            return torch.cat([*self.past[::2], key], dim=-2), torch.cat([*self.past[1::2], value], dim=-2)

    return RecordingCache
