"""`transformer` heads: one decoder layer each, in parallel on a trunk without its last layer.

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
from weighted_mtp_core.model.families import anatomy, body_states, layers_of, with_layers
from weighted_mtp_core.model.heads import Heads, SplitModel


class TransformerHeads(Heads):
    """Bodies of one layer, fed with the trunk's states in place of embeddings."""

    kind = "transformer"

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
                hint='use a deeper model, or `model.head = "linear"`',
            )
        last = layers[-1]
        setattr(body, layers_name, layers[:-1])
        setattr(body, norm_name, nn.Identity())
        heads = cls(
            _one_layer_body(
                body,
                last if k == 0 else copy.deepcopy(last),
                layers_name=layers_name,
                norm_name=norm_name,
            )
            for k in range(n_future)
        )
        body.config = with_layers(body.config, len(layers) - 1)
        return SplitModel(trunk=body, heads=heads, norm=norm)

    def run(
        self, k: int, hidden_BTH: Tensor, *, position_BT: Tensor | None, cache: Any, seen_BS: Tensor | None
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


def _one_layer_body(body: Any, layer: nn.Module, *, layers_name: str, norm_name: str) -> nn.Module:
    """Return a body of the same family that consists of this layer: no embeddings, no norm."""
    head: nn.Module = type(body)(with_layers(body.config, 1))
    for name, child in list(head.named_children()):
        if isinstance(child, nn.Embedding):
            # Learned positions are in the trunk's states already; the body would add them again.
            is_position = child.num_embeddings != body.config.vocab_size
            setattr(head, name, _ZeroEmbedding(child.embedding_dim) if is_position else nn.Identity())
        elif name == norm_name:
            setattr(head, name, nn.Identity())
        elif name == layers_name:
            setattr(head, name, nn.ModuleList([layer]))
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, "layer_idx", 0)  # noqa: B010 - an attribute that nn.Module's type does not know
    return head


class _ZeroEmbedding(nn.Module):
    """Replaces the embedding of learned positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, positions: Tensor) -> Tensor:
        """Return zeros `[..., H]`."""
        return torch.zeros(*positions.shape, self.width, device=positions.device)
