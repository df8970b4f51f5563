"""Wrap a decoder layer of any model family in a body of its own, which reads states instead of token ids.

Shape letters: H hidden.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from weighted_mtp_core.model.families import SCALES_OF_EMBEDDINGS


def one_layer_body(
    body: Any, layer: nn.Module, *, config: Any, layers_name: str, norm_name: str
) -> nn.Module:
    """Return a copy of `body` with the single layer `layer`, without embeddings, final norm and dropout.

    The layer is not copied, but its index is set to 0; dropout inside the layer is kept.
    """
    instead: dict[int, Any] = {id(body.config): config}  # replacements in the copy of the body
    for name, child in body.named_children():
        if name == layers_name:
            instead[id(child)] = nn.ModuleList([layer])
        elif isinstance(child, nn.Embedding) and child.num_embeddings != body.config.vocab_size:
            # The trunk's states already contain the learned embeddings of positions, which a copy of this
            # module would add again.
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
    """Give a module of the layer the index 0 and the config of the new body, which has only this layer."""
    for name in ("layer_idx", "layer_id"):
        if hasattr(module, name):
            setattr(module, name, 0)
    if isinstance(getattr(module, "config", None), type(config)):
        setattr(module, "config", config)  # noqa: B010 - an attribute that nn.Module's type does not know


class _ZeroEmbedding(nn.Module):
    """Replaces a learned embedding of positions with zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        """Return zeros `[H]` to add to states, whatever the arguments, which differ between families."""
        first = next(iter((*given, *named.values())))
        return torch.zeros(self.width, device=first.device)
