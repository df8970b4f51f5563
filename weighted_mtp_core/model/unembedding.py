"""Maps states to logits: a matrix and, in some families, a bias, a scale or a soft-cap.

    z = scale * (W h + b),    logits = c * tanh(z / c) with a soft-cap c, otherwise z

W is the matrix, h a state and b the bias. Granite, Cohere, Falcon-H1 and MiniCPM3 have a scale, Gemma-2 has a
soft-cap (Gemma Team 2024, section 2), GPT-J and Phi have a bias. Loss, generation and export all use this
class, so that they compute the same logits as the base model.

Shape letters: N rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weighted_mtp_core.runtime.sharding import sum_into_shard, whole


class Unembedding(nn.Module):
    """The shared unembedding of all heads.

    Args:
        linear: The base model's unembedding; its parameters are not copied.
        scale: Factor of `W h + b`.
        soft_cap: The soft-cap c; None if logits are not capped.

    Attributes:
        weight: The matrix W; if W is sharded, each use gathers it.
        bias: The bias b; None if the base model's unembedding has no bias.
        scale: Factor of `W h + b`.
        soft_cap: The soft-cap c; None if logits are not capped.
        stored: Whether the matrix is stored in bfloat16, although states are float32; see `stored_base`.
    """

    gathers_itself = True

    def __init__(self, linear: nn.Module, *, scale: float = 1.0, soft_cap: float | None = None) -> None:
        super().__init__()
        self.weight: nn.Parameter = linear.get_parameter("weight")
        bias = getattr(linear, "bias", None)
        self.bias: nn.Parameter | None = bias if isinstance(bias, nn.Parameter) else None
        self.scale = scale
        self.soft_cap = soft_cap
        self.stored = False
        self._gradient_VH: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the states that the unembedding reads without autocast."""
        return torch.float32 if self.stored else self.weight.dtype

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix W in this dtype; gathering a sharded W is a collective operation."""
        # Shards are sent in W's own dtype or in the requested dtype, whichever is smaller.
        smaller = min(self.weight.dtype, dtype, key=lambda each: each.itemsize)
        return whole(self.weight, smaller).to(dtype)

    def matrix_gradient(self) -> Tensor | None:
        """Return the tensor `[V, H]` to which this process adds its gradient with respect to W, if any.

        The result is None if W is frozen. The tensor is the attribute `grad` of W or, for a sharded W, a
        buffer that `finish_gradient` adds to this attribute.
        """
        if not isinstance(self.weight, DTensor):
            return gradient_of(self.weight)
        if self._gradient_VH is None and self.weight.requires_grad:
            self._gradient_VH = torch.zeros(self.weight.shape, device=self.weight.device)
        return self._gradient_VH

    def add_matrix_gradient(self, gradient_NV: Tensor, state_NH: Tensor) -> None:
        """Add the gradient of W, computed from the gradient of the products `W h`, unless W is frozen."""
        weight = self.weight
        if not weight.requires_grad:
            return
        if weight.grad is None and not isinstance(weight, DTensor) and weight.dtype == gradient_NV.dtype:
            weight.grad = gradient_NV.T @ state_NH  # without a pass that fills a new gradient with zeros
            return
        gradient_VH = self.matrix_gradient()
        assert gradient_VH is not None
        if gradient_VH.dtype == gradient_NV.dtype:
            gradient_VH.addmm_(gradient_NV.T, state_NH)
        else:
            gradient_VH += gradient_NV.T @ state_NH

    def finish_gradient(self) -> None:
        """Complete the gradient of W; call this method before the backward pass of the trunk.

        With a tied embedding, the backward pass of the trunk adds to the completed gradient. The gradient of
        a sharded W is summed over all processes, which must all call this method. If W is trained and has
        no gradient yet, its gradient becomes 0.
        """
        if not isinstance(self.weight, DTensor) or not self.weight.requires_grad:
            gradient_of(self.weight)
            return
        own_VH = self.matrix_gradient()
        assert own_VH is not None
        self._gradient_VH = None
        found = sum_into_shard(self.weight, own_VH)
        self.weight.grad = found if self.weight.grad is None else self.weight.grad.add_(found)

    @property
    def is_plain(self) -> bool:
        """Whether logits are just `W h`, without bias, scale or soft-cap."""
        return self.bias is None and self.scale == 1.0 and self.soft_cap is None

    def forward(self, state: Tensor) -> Tensor:
        """Return logits `[..., V]` of states `[..., H]`."""
        return self.logits(state, self.matrix(state.dtype if self.stored else self.weight.dtype))

    def logits(self, state: Tensor, matrix_VH: Tensor) -> Tensor:
        """Return logits `[..., V]` of states `[..., H]`, computed with a result of `matrix`."""
        return self._shaped(nn.functional.linear(state, matrix_VH, self.bias))

    def shape_(self, product_NV: Tensor) -> Tensor:
        """Convert the products `W h` to logits, in place."""
        if self.bias is not None:
            product_NV += self.bias.detach()
        if self.scale != 1.0:
            product_NV *= self.scale
        if self.soft_cap is not None:
            product_NV.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return product_NV

    def slope(self, logits_NV: Tensor) -> Tensor | float:
        """Return the derivative of the logits with respect to `W h + b`, computed from the logits."""
        if self.soft_cap is None:
            return self.scale
        return (logits_NV / self.soft_cap).square_().neg_().add_(1).mul_(self.scale)

    def as_linear(self) -> nn.Linear:
        """Return an `nn.Linear` that shares the matrix and the bias."""
        outputs, inputs = self.weight.shape
        with torch.device("meta"):
            linear = nn.Linear(inputs, outputs, bias=self.bias is not None)
        linear.weight = self.weight
        linear.bias = self.bias  # type: ignore[assignment] # nn.Linear's own bias is None if it has none
        return linear

    def _shaped(self, product: Tensor) -> Tensor:
        """Return the logits of `W h + b`; unlike `shape_`, this keeps the autograd graph."""
        if self.scale != 1.0:
            product = product * self.scale
        if self.soft_cap is not None:
            product = self.soft_cap * torch.tanh(product / self.soft_cap)
        return product


def gradient_of(parameter: nn.Parameter | None) -> Tensor | None:
    """Return a parameter's gradient, allocated if necessary; None for a frozen or missing parameter."""
    if parameter is None or not parameter.requires_grad:
        return None
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
