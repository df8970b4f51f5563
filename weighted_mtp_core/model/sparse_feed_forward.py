"""Compute a layer's feed-forward network only at the positions whose states are read.

Attention needs every position. The feed-forward network, three quarters of a Llama layer, works position by
position: where the state is not read, neither the network nor its gradient is computed. This is done with
    hooks on
the layer's module `mlp`; a layer of a family that names it otherwise is computed in full.

Shape letters: B rows, T positions, H hidden, N positions in the flattened [B, T].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def sparse_rows(layer: nn.Module, index_N: Tensor) -> Iterator[None]:
    """Inside this context, compute the network only at positions `index_N` (int64) of `[B, T]`."""
    network = getattr(layer, "mlp", None)
    if network is None:
        yield
        return
    shapes: list[torch.Size] = []

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes[:] = [args[0].shape]
        return args[0].flatten(0, 1).index_select(0, index_N)[None], *args[1:]

    def scatter(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # mixtures of experts also return their router's logits
            return scatter(_, __, output[0]), *output[1:]
        (shape,), state_1NH = shapes, output
        return state_1NH.new_zeros(shape).flatten(0, 1).index_copy(0, index_N, state_1NH[0]).view(shape)

    with network.register_forward_pre_hook(gather), network.register_forward_hook(scatter):
        yield


@contextmanager
def one_position_per_row(layer: nn.Module, index_B: Tensor) -> Iterator[None]:
    """Inside this context, compute the network at one position of each row.

    Its output is added to the whole row, which is correct at that position only, and costs less than copying
    it into a row of zeros.

    Args:
        layer: A decoder layer.
        index_B: int64 position of each row in the flattened `[B, T]`.
    """

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].flatten(0, 1).index_select(0, index_B)[:, None], *args[1:]

    network = getattr(layer, "mlp", None)
    if network is None:
        yield
        return
    with network.register_forward_pre_hook(gather):
        yield
