"""A small causal transformer for a critic of its own: pre-norm, rotary positions, documents kept apart.

Shape letters: B batch rows, T positions, A attention heads, E size of one, D width.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

_BASE = 10000.0  # longest wavelength of rotary positions, as in the paper


@frozen(kw_only=True, eq=False)
class Sight:
    """What each token sees, and from where.

    Attributes:
        mask_B1TT: True where a token (row) may look at another (column): not later, and in its own document.
        cos_B1TE: Cosines of rotary positions, counted from the start of the document.
        sin_B1TE: Sines.
    """

    mask_B1TT: Tensor
    cos_B1TE: Tensor
    sin_B1TE: Tensor

    @classmethod
    def of(cls, document_BT: Tensor, *, size: int) -> Sight:
        """Return the sight of attention heads of `size` (Su et al. 2021, arXiv:2104.09864, eq. 34)."""
        position_BT = positions(document_BT)
        same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
        rate_E = _BASE ** -(torch.arange(0, size, 2, device=document_BT.device) / size)
        angle_BTE = (position_BT[:, :, None] * rate_E).repeat(1, 1, 2)
        return cls(
            mask_B1TT=same_BTT.tril()[:, None],
            cos_B1TE=angle_BTE.cos()[:, None],
            sin_B1TE=angle_BTE.sin()[:, None],
        )

    def turn(self, x_BATE: Tensor) -> Tensor:
        """Rotate pairs of dimensions by their position."""
        first, second = x_BATE.chunk(2, dim=-1)
        return x_BATE * self.cos_B1TE + torch.cat([-second, first], dim=-1) * self.sin_B1TE


def positions(document_BT: Tensor) -> Tensor:
    """Return each token's int64 position in its document, from 0."""
    index_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    starts_BT = torch.ones_like(document_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return index_T - (starts_BT * index_T).cummax(dim=1).values


class Layer(nn.Module):
    """Attention and a feed-forward network, each behind a norm and beside the residual stream."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.forward_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor, sight: Sight) -> Tensor:
        """Return the residual stream behind this layer."""
        x_BTD = x_BTD + self._attend(self.attention_norm(x_BTD), sight)
        step_BTD: Tensor = self.down(F.gelu(self.up(self.forward_norm(x_BTD))))
        return x_BTD + step_BTD

    def _attend(self, x_BTD: Tensor, sight: Sight) -> Tensor:
        rows, length, width = x_BTD.shape
        split = self.query_key_value(x_BTD).view(rows, length, 3, self.heads, width // self.heads)
        query_BATE, key_BATE, value_BATE = split.permute(2, 0, 3, 1, 4).unbind()
        mixed_BATE = F.scaled_dot_product_attention(
            sight.turn(query_BATE), sight.turn(key_BATE), value_BATE, attn_mask=sight.mask_B1TT
        )
        out_BTD: Tensor = self.out(mixed_BATE.transpose(1, 2).reshape(rows, length, width))
        return out_BTD
