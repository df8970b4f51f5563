"""Compute a head's feed-forward network only at the places whose states will be read.

Attention has to look at every place; the network behind it, three quarters of a Llama layer, works place by
place: what nobody reads is left out there, and so are its gradients. Hooks do it, so that any transformers
layer whose network is a module of its own, `mlp`, is served; of another all is computed.

Shape letters: B rows, T positions, H hidden, N places in the flattened [B, T].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def only_at(layer: nn.Module, index_N: Tensor) -> Iterator[None]:
    """Within, compute a layer's network at the places `index_N` (int64) of `[B, T]`; it adds 0 elsewhere."""
    network = getattr(layer, "mlp", None)
    if network is None:
        yield
        return
    shapes: list[torch.Size] = []

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes[:] = [args[0].shape]
        return args[0].flatten(0, 1).index_select(0, index_N)[None], *args[1:]

    def scatter(_: nn.Module, __: Any, found: Any) -> Any:
        if isinstance(found, tuple):  # mixtures of experts add what their router said
            return scatter(_, __, found[0]), *found[1:]
        (shape,), state_1NH = shapes, found
        return state_1NH.new_zeros(shape).flatten(0, 1).index_copy(0, index_N, state_1NH[0]).view(shape)

    with network.register_forward_pre_hook(gather), network.register_forward_hook(scatter):
        yield


@contextmanager
def once_a_row(layer: nn.Module, index_B: Tensor) -> Iterator[None]:
    """Within, compute a layer's network at one place of each row: `only_at`, for a few tokens.

    What it says of that place is added to the whole row, which is right there and nowhere else, and costs
    less than laying it into a row of zeros.

    Args:
        layer: Of a head.
        index_B: The place of each row, int64 into the flattened `[B, T]`.
    """

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].flatten(0, 1).index_select(0, index_B)[:, None], *args[1:]

    network = getattr(layer, "mlp", None)
    if network is None:
        yield
        return
    with network.register_forward_pre_hook(gather):
        yield
