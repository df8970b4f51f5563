"""Compute the gates of feed-forward networks again in the backward pass instead of storing them.

A gated feed-forward network computes `down(silu(a) * b)` (Shazeer 2020, "GLU Variants Improve Transformer",
section 2). Autograd stores `a`, `b`, `silu(a)` and, if the weight of `down` or an adapter is trained, the
product. `silu(a)` follows from `a`, with the same bits, in much less time than a matrix product takes.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn


def recompute_gates(trunk: nn.Module) -> None:
    """Let the backward pass of a transformers model compute `silu(a)` again wherever it is multiplied.

    Nothing changes for another function than SiLU, or if the product is not the input of a module that has
    the same parent as the function.
    """
    from transformers.activations import ACT2FN

    for module in trunk.modules():
        children = list(module.children())
        if any(isinstance(child, type(ACT2FN["silu"])) for child in children):
            for child in children:
                child.register_forward_pre_hook(_forget_gate)


def _forget_gate(_: nn.Module, inputs: tuple[Any, ...]) -> None:
    """If the input is `silu(a) * b`, replace the stored `silu(a)` by a function that computes it."""
    product: Any = getattr(inputs[0], "grad_fn", None) if inputs else None
    if product is None or product.name() != "MulBackward0":
        return
    (gate, _), (other, _) = product.next_functions
    if gate is None or other is None or gate.name() != "SiluBackward0":
        return
    # PyTorch documents the names of stored tensors. It refuses a second function for a stored tensor;
    # activation checkpointing has one already, and stores nothing inside of a layer.
    with suppress(RuntimeError):
        product._raw_saved_self.register_hooks(  # noqa: SLF001
            lambda _: None,
            lambda _: nn.functional.silu(gate._saved_self),  # noqa: SLF001
        )
