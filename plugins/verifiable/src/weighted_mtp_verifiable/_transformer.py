"""A small causal transformer for critics: pre-norm, rotary positions, documents apart from each other.

Shape letters: B batch rows, T positions, N heads, E head size, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it


def rotary(position_BT: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines `[B, 1, T, E]` (Su et al. 2021, https://arxiv.org/abs/2104.09864, eq. 34)."""
    exponent_E = torch.arange(0, head_size, 2, device=position_BT.device) / head_size
    angle_BTE = position_BT[:, None, :, None] * 10000.0**-exponent_E
    angle_BTE = torch.cat([angle_BTE, angle_BTE], dim=-1)
    return angle_BTE.cos(), angle_BTE.sin()


def rotate(x_BNTE: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of dimensions by their position."""
    first, second = x_BNTE.chunk(2, dim=-1)
    return x_BNTE * turn[0] + torch.cat([-second, first], dim=-1) * turn[1]


class Layer(nn.Module):
    """Attention and a feed-forward network, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.RMSNorm(width)
        self.norm_forward = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Return the residual stream after this layer."""
        rows, length, width = x_BTD.shape
        qkv = self.qkv(self.norm_attention(x_BTD)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(
            rotate(query, turn), rotate(key, turn), value, attn_mask=mask, is_causal=mask is None
        )
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        out: Tensor = x_BTD + self.down(F.gelu(self.up(self.norm_forward(x_BTD))))
        return out


class CausalTransformer(nn.Module):
    """First version."""

    def __init__(self, *, vocab_size: int | None, input_size: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width) if vocab_size is not None else nn.Linear(input_size, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 1)
        self.head_size = width // heads
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if isinstance(self.embed, nn.Embedding):
            nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, source: Tensor, document_BT: Tensor) -> Tensor:
        """Return a logit a token."""
        x_BTD = self.embed(source)
        turn = rotary(torch.arange(document_BT.shape[1], device=document_BT.device)[None], self.head_size)
        for layer in self.layers:
            x_BTD = layer(x_BTD, turn, None)
        out: Tensor = self.head(self.norm(x_BTD)).squeeze(-1)
        return out
