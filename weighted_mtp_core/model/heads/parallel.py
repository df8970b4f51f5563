"""`parallel` heads: each is one decoder layer on the trunk, the base model without its last layer.

Head 1 is the pretrained last layer, heads 2..K start as copies of it (Gloeckle et al. 2024, section 2).

Shape letters: B rows, T positions, S cached and new tokens, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.families import (
    SCALES_OF_EMBEDDINGS,
    anatomy,
    body_states,
    layers_of,
    with_layers,
)
from weighted_mtp_core.model.heads import Heads, SplitModel


class ParallelHeads(Heads):
    """Bodies of one layer, fed with the trunk's states in place of embeddings."""

    kind = "parallel"

    @classmethod
    def split(cls, base: Any, *, n_future: int) -> SplitModel:
        """Take the last layer and the final norm off the body.

        Raises:
            WmtpError: The model has one layer only, or is not built of layers and a final norm.
        """
        body, layers_name, norm_name = anatomy(base)
        layers, norm = getattr(body, layers_name), getattr(body, norm_name)
        if len(layers) < 2:
            raise WmtpError(
                "a model of one layer has no trunk left when its last layer becomes the head",
                hint='use a deeper model, or `model.heads.kind = "medusa"`',
            )
        last = layers[-1]
        config = with_layers(body.config, slice(-1, None))
        heads = cls(
            _one_layer_body(
                body,
                last if k == 0 else copy.deepcopy(last),
                config=config,
                layers_name=layers_name,
                norm_name=norm_name,
            )
            for k in range(n_future)
        )
        setattr(body, layers_name, layers[:-1])
        setattr(body, norm_name, nn.Identity())
        body.config = with_layers(body.config, slice(0, -1))
        return SplitModel(trunk=body, heads=heads, norm=norm)

    def run(
        self,
        k: int,
        hidden_BTH: Tensor,
        *,
        position_BT: Tensor | None = None,
        cache: Any = None,
        seen_BS: Tensor | None = None,
    ) -> Tensor:
        """Return head k's states `[B, T, H]`."""
        return body_states(
            self[k - 1], inputs_embeds=hidden_BTH, position_BT=position_BT, cache=cache, seen_BS=seen_BS
        )

    def layer(self, k: int) -> nn.Module:
        """Return head k's decoder layer."""
        return layers_of(self[k - 1])[0]

    @property
    def bodies(self) -> Sequence[nn.Module]:
        """All heads."""
        return tuple(self)

    def rejoin(self, base: Any, *, trunk: nn.Module, norm: nn.Module) -> None:
        """Put the trunk's layers, head 1's and the norm into a causal LM."""
        body, layers_name, norm_name = anatomy(base)
        super().rejoin(base, trunk=trunk, norm=norm)
        setattr(body, layers_name, nn.ModuleList([*layers_of(trunk), self.layer(1)]))
        setattr(body, norm_name, norm)


def _one_layer_body(
    body: Any, layer: nn.Module, *, config: Any, layers_name: str, norm_name: str
) -> nn.Module:
    """Return a body of the same family that consists of this layer: no embeddings, no norm, no dropout."""
    instead: dict[int, Any] = {id(body.config): config}  # what a copy of the body has in place of its own
    for name, child in body.named_children():
        if name == layers_name:
            instead[id(child)] = nn.ModuleList([layer])
        elif isinstance(child, nn.Embedding) and child.num_embeddings != body.config.vocab_size:
            # Learned positions are in the trunk's states already; the body would add them again.
            instead[id(child)] = _ZeroEmbedding(child.embedding_dim)
        elif name == norm_name or isinstance(child, nn.Dropout) or any(True for _ in child.parameters()):
            instead[id(child)] = nn.Identity()
    head: nn.Module = copy.deepcopy(body, instead)
    for name in SCALES_OF_EMBEDDINGS:
        if hasattr(head, name):
            setattr(head, name, 1.0)
    for module in layer.modules():
        _renumber(module, config)
    return head


def _renumber(module: nn.Module, config: Any) -> None:
    """Make a module of the last layer one of the only layer."""
    for name in ("layer_idx", "layer_id"):
        if hasattr(module, name):
            setattr(module, name, 0)
    if isinstance(getattr(module, "config", None), type(config)):
        setattr(module, "config", config)  # noqa: B010 - an attribute that nn.Module's type does not know


class _ZeroEmbedding(nn.Module):
    """Replaces the embedding of learned positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        """Return zeros `[H]` to add to states; the arguments, which differ between families, are ignored."""
        first = next(iter((*given, *named.values())))
        return torch.zeros(self.width, device=first.device)
