"""Make a decoder layer of any family of models a model of its own: a body of one layer that reads states.

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
    """Return a body of the same family that consists of this layer, without embeddings, norm and dropout."""
    instead: dict[int, Any] = {id(body.config): config}  # replacements of modules in the copy of the body
    for name, child in body.named_children():
        if name == layers_name:
            instead[id(child)] = nn.ModuleList([layer])
        elif isinstance(child, nn.Embedding) and child.num_embeddings != body.config.vocab_size:
            # The trunk's states already contain learned embeddings of positions; the body would add them
            # again.
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
    """Give a module of the last layer the layer index 0."""
    for name in ("layer_idx", "layer_id"):
        if hasattr(module, name):
            setattr(module, name, 0)
    if isinstance(getattr(module, "config", None), type(config)):
        setattr(module, "config", config)  # noqa: B010 - an attribute that nn.Module's type does not know


class _ZeroEmbedding(nn.Module):
    """Replaces the learned embedding of positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        """Return zeros `[H]` to add to states; ignores the arguments, which differ between families."""
        first = next(iter((*given, *named.values())))
        return torch.zeros(self.width, device=first.device)
