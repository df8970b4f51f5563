"""Compute a layer's feed-forward network only at the positions whose states are read.

Attention needs every position. The feed-forward network, which has about three quarters of the parameters of
a Llama layer, is computed independently at each position, so the network and its gradient can be skipped at
positions whose state is not read. Only a network with the name `mlp` is skipped; a layer whose feed-forward
network has another name is computed in full.

Shape letters: B rows, T positions, H hidden, N selected positions of the flattened [B, T].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def sparse_rows(layer: nn.Module, index_N: Tensor) -> Iterator[None]:
    """Inside this context, compute a layer's feed-forward network only at the positions `index_N`.

    Args:
        layer: A decoder layer.
        index_N: int64 positions in the flattened `[B, T]`.
    """
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
    """Inside this context, compute a layer's feed-forward network only at one position of each row.

    The layer adds the network's output to all positions of the row, so only the state at the chosen position
    is correct. Adding to all positions costs less than copying the output into a row of zeros.

    Args:
        layer: A decoder layer.
        index_B: int64 index of each row's chosen position in the flattened `[B, T]`.
    """

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].flatten(0, 1).index_select(0, index_B)[:, None], *args[1:]

    network = getattr(layer, "mlp", None)
    if network is None:
        yield
        return
    with network.register_forward_pre_hook(gather):
        yield
