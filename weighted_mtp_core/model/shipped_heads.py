"""Use a base model's layers for multi-token prediction (MTP) as `sequential` heads, and export these heads.

An MTP layer consists of a decoder layer, norms and a projection. The decoder layer is loaded as an additional
layer of the model, so that transformers renames and joins its tensors like the tensors of the other layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from safetensors import safe_open
from torch import Tensor, nn

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import quoted
from weighted_mtp_core.model.families import anatomy, layers_of, more_layers, text_config
from weighted_mtp_core.model.heads.sequential import SequentialHeads, SequentialModule
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.shipped_layers import (
    LAYOUTS,
    Layout,
    Shared,
    names_of_shipped_layers,
    tensor_files,
)
from weighted_mtp_core.runtime.sharding import equal

_NEW = 'set `model.heads.init = "new"`, which ignores these layers'


@frozen(kw_only=True, eq=False)
class ShippedHeads:
    """The MTP layers in the files of a base model.

    Attributes:
        source: A transformers directory or a hub id.
        layout: How the MTP layers are stored.
        layers: Number of the model's decoder layers.
        depth: Number of MTP layers.
        copies: The entries of `Layout.copies` that exist in the files, by tensor name.
        config: The config of the model.
    """

    source: Path | str
    layout: Layout
    layers: int
    depth: int
    copies: Mapping[str, Shared]
    config: Any

    def names(self, depth: int) -> dict[str, str]:
        """Return the tensor name of each parameter of `SequentialModule` outside its decoder layer.

        Args:
            depth: Index of the MTP layer, from 0.
        """
        return {own: self._named(name, depth) for own, name in self.layout.names.items()}

    def block(self, depth: int) -> str:
        """Return the common prefix of the tensor names of an MTP layer's decoder layer.

        Args:
            depth: Index of the MTP layer, from 0.
        """
        return self._named(self.layout.block, depth)

    def _named(self, name: str, depth: int) -> str:
        return name.format(layer=self.layers + depth, depth=depth)

    @property
    def beside(self) -> re.Pattern[str]:
        """A pattern for the names of MTP layers' tensors that are not part of a decoder layer.

        The pattern matches the names before and after transformers renames them.
        """
        names = {name for depth in range(self.depth) for name in self.names(depth).values()} | set(
            self.copies
        )
        for depth in range(self.depth):
            further = f"model.layers.{self.layers + depth}."
            names |= {name.replace(self.block(depth), further) for name in names}
        return re.compile("|".join(f"^{re.escape(name)}$" for name in sorted(names)))

    def options(self) -> dict[str, Any]:
        """Return the arguments with which `from_pretrained` loads MTP layers as additional decoder layers."""
        config = copy.deepcopy(self.config)
        for name, value in more_layers(text_config(config), self.depth).items():
            setattr(text_config(config), name, value)
        renamed = {
            f"^{re.escape(self.block(depth))}": f"model.layers.{self.layers + depth}."
            for depth in range(self.depth)
        }
        return {"config": config, "key_mapping": renamed}

    def take_blocks(self, base: Any) -> Sequence[nn.Module]:
        """Remove the additional layers from a model that was loaded with `options`; return these layers."""
        body, name, _ = anatomy(base)
        layers = getattr(body, name)
        setattr(body, name, layers[: self.layers])
        own = text_config(self.config)
        for key in more_layers(own, self.depth):
            setattr(text_config(base.config), key, getattr(own, key))
        return tuple(layers[self.layers :])

    @torch.no_grad()
    def load_into(self, policy: Policy, blocks: Sequence[nn.Module]) -> None:
        """Load the weights of the MTP layers into heads 2..K, which then compute the same as these layers.

        Args:
            policy: A policy with `sequential` heads.
            blocks: The decoder layers from `take_blocks`.

        Raises:
            WmtpError: The MTP layers are not of the same kind as the model's last decoder layer, contain NaN
                or infinity, or have an embedding or unembedding of their own.
        """
        shared, heads = _shared(policy), policy.heads
        for name, kind in self.copies.items():
            if not equal(shared[kind], self._read(name)):
                raise self.unfit(f"`{name}` is not a copy of the model's {kind}, which all heads share")
        for depth, block in enumerate(blocks):
            module = heads[depth + 1]
            values = {own: self._read(name) for own, name in self.names(depth).items()}
            bad = [own for own, value in values.items() if not value.isfinite().all()]
            if bad:
                raise self.unfit(f"`{self.names(depth)[bad[0]]}` contains NaN or infinity")
            try:
                values |= {f"{_layer_of(module)}{own}": value for own, value in block.state_dict().items()}
                module.load_state_dict(values)
            except RuntimeError as error:
                raise self.unfit(
                    f"they differ from its last layer ({' '.join(str(error).split())})"
                ) from error
        assert isinstance(heads, SequentialHeads)
        heads.wiring = evolve(heads.wiring, recurrent=policy.n_future > self.depth + 1)

    def tensors(self, policy: Policy) -> dict[str, Tensor]:
        """Return the tensors of heads 2..K, and `copies`, under the names in the base model's files."""
        shared = _shared(policy)
        found = {name: shared[kind].detach().clone() for name, kind in self.copies.items()}
        for depth in range(self.depth):
            module = policy.heads[depth + 1]
            names, layer = self.names(depth), _layer_of(module)
            for own, tensor in module.state_dict().items():
                found[names.get(own) or self.block(depth) + own.removeprefix(layer)] = tensor
        return found

    def _read(self, name: str) -> Tensor:
        with safe_open(tensor_files(self.source)[name], framework="pt") as tensors:
            value: Tensor = tensors.get_tensor(name)
            return value

    def unfit(self, why: str) -> WmtpError:
        """Return the error for MTP layers that cannot become heads."""
        return WmtpError(
            f"the MTP layers of the base model `{self.source}` cannot be trained: {why}", hint=_NEW
        )


def find_shipped_heads(source: Path | str, config: Any, *, n_future: int, shared: bool) -> ShippedHeads:
    """Find the MTP layers in the files of a base model.

    Args:
        source: A transformers directory or a hub id.
        config: The config of the base model.
        n_future: K.
        shared: Whether all heads 2..K use one MTP layer.

    Raises:
        WmtpError: The files contain no MTP layers, the MTP layers cannot become heads, or the number of MTP
            layers does not suit K.
    """
    text = text_config(config)
    pattern = names_of_shipped_layers(source)
    names = {name for name in tensor_files(source) if pattern.search(name)}
    if not names:
        raise WmtpError(
            f"the base model `{source}` ships no MTP layers", hint='set `model.heads.init = "new"`'
        )
    layout = next((each for each in LAYOUTS if text.model_type in each.families), None)
    if layout is None:
        known = quoted(family for each in LAYOUTS for family in each.families)
        raise WmtpError(
            f"the MTP layers of a `{text.model_type}` model cannot be trained, only those of {known}",
            hint=_NEW,
        )
    layers = int(text.num_hidden_layers)
    found = ShippedHeads(source=source, layout=layout, layers=layers, depth=0, copies={}, config=config)
    while any(name.startswith(found.block(found.depth)) for name in names):
        found = evolve(found, depth=found.depth + 1)
    copies = {
        name: kind
        for depth in range(found.depth)
        for own, kind in layout.copies.items()
        if (name := own.format(layer=layers + depth, depth=depth)) in names
    }
    found = evolve(found, copies=copies)
    _refuse_other_names(found, names)
    _refuse_other_count(found, n_future=n_future, shared=shared)
    more_layers(text, found.depth)  # raises if the MTP layers are of another kind than the last layer
    return found


def _refuse_other_names(found: ShippedHeads, names: AbstractSet[str]) -> None:
    """Refuse MTP layers with missing or unknown tensors outside their decoder layers.

    Several MTP layers with one common projection are refused, too.
    """
    outside = [name for depth in range(found.depth) for name in found.names(depth).values()]
    blocks = tuple(found.block(depth) for depth in range(found.depth))
    unknown = sorted(
        name for name in set(names).difference(outside, found.copies) if not name.startswith(blocks)
    )
    missing = sorted(set(outside) - names)
    if unknown or missing:
        raise found.unfit(f"`{(*missing, *unknown)[0]}` is {'missing' if missing else 'unknown'}")
    if len(set(outside)) < len(outside):
        raise found.unfit(
            f"{found.depth} layers share the projection `{found.names(0)['projection.weight']}`"
        )


def _refuse_other_count(found: ShippedHeads, *, n_future: int, shared: bool) -> None:
    """Refuse a number of heads that the MTP layers do not allow."""
    single = found.depth == 1
    if n_future == found.depth + 1 and (single or not shared):
        return
    if n_future > 2 and single and shared and found.layout.repeats:
        return
    layers = "1 MTP layer" if single else f"{found.depth} MTP layers"
    repeat = ", or `model.heads.shared = true`: all heads then use the layer"
    raise WmtpError(
        f"the base model `{found.source}` ships {layers}, so `model.n_future` cannot be {n_future}"
        + (" with `model.heads.shared = true`" if shared else ""),
        hint=f"set `model.n_future = {found.depth + 1}`"
        + (repeat if single and not shared and n_future > 2 and found.layout.repeats else "")
        + (" and `model.heads.shared = false`" if shared and not single else ""),
    )


def _layer_of(module: nn.Module) -> str:
    """Return the common prefix of the parameter names of a `SequentialModule`'s decoder layer."""
    assert isinstance(module, SequentialModule)
    layer = layers_of(module.body)[0]
    return next(f"{name}." for name, each in module.named_modules() if each is layer)


def _shared(policy: Policy) -> dict[Shared, Tensor]:
    trunk: Any = policy.trunk
    return {"embedding": trunk.get_input_embeddings().weight, "unembedding": policy.unembedding.weight}
