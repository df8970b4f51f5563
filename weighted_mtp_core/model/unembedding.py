"""From states to logits: a matrix, and what some families do with its product.

    z = scale * (W h + b),    logits = c * tanh(z / c) with a soft-cap c, else z

Granite, Cohere, Falcon-H1 and MiniCPM3 scale, Gemma-2 caps (Gemma Team 2024, section 2), GPT-J and Phi add a
bias. Loss, generation and export read this one object, so that all of them compute the model's own logits.

Shape letters: N rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Unembedding(nn.Module):
    """The shared unembedding of all heads.

    Args:
        linear: The base model's own; its parameters are used, not copied.
        scale: Factor of the product.
        soft_cap: c; None if logits are not capped.
    """

    def __init__(self, linear: nn.Module, *, scale: float = 1.0, soft_cap: float | None = None) -> None:
        super().__init__()
        self.weight: nn.Parameter = linear.get_parameter("weight")
        bias = getattr(linear, "bias", None)
        self.bias: nn.Parameter | None = bias if isinstance(bias, nn.Parameter) else None
        self.scale = scale
        self.soft_cap = soft_cap

    @property
    def is_plain(self) -> bool:
        """Whether logits are the product alone."""
        return self.bias is None and self.scale == 1.0 and self.soft_cap is None

    def forward(self, state: Tensor) -> Tensor:
        """Return logits `[..., V]` of states `[..., H]`."""
        return self._shaped(nn.functional.linear(state, self.weight, self.bias))

    def shape_(self, product_NV: Tensor) -> Tensor:
        """Turn products `W h` into logits, in place."""
        if self.bias is not None:
            product_NV += self.bias.detach()
        if self.scale != 1.0:
            product_NV *= self.scale
        if self.soft_cap is not None:
            product_NV.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return product_NV

    def slope(self, logits_NV: Tensor) -> Tensor | float:
        """Return the logits' derivative by `W h + b`, from the logits themselves."""
        if self.soft_cap is None:
            return self.scale
        return (logits_NV / self.soft_cap).square_().neg_().add_(1).mul_(self.scale)

    def as_linear(self) -> nn.Linear:
        """Return an `nn.Linear` that shares the matrix and the bias."""
        outputs, inputs = self.weight.shape
        with torch.device("meta"):
            linear = nn.Linear(inputs, outputs, bias=self.bias is not None)
        linear.weight = self.weight
        linear.bias = self.bias  # type: ignore[assignment] # None is what nn.Linear itself has without one
        return linear

    def _shaped(self, product: Tensor) -> Tensor:
        """Return logits of `W h + b`; unlike `shape_`, with a graph."""
        if self.scale != 1.0:
            product = product * self.scale
        if self.soft_cap is not None:
            product = self.soft_cap * torch.tanh(product / self.soft_cap)
        return product
