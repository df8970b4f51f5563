"""A small causal transformer for a critic, with pre-norm layers and rotary position embeddings.

A token attends only to tokens of its own document.

Shape letters: B batch rows, T positions, A attention heads, E size of one head, D width.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from weighted_mtp_verifiable._reductions import same_as_previous

_ROTARY_BASE = 10000.0  # base of the frequencies of the rotary embedding (Su et al. 2021)


@frozen(kw_only=True, eq=False)
class AttentionContext:
    """Attention mask and rotary position embedding of a batch, shared by all layers.

    Attributes:
        mask_B1TT: True at [b, 0, i, j] if token i of row b may attend to token j. Token j must belong to the
            same document and must not be later than token i.
        cos_B1TE: Cosines of the rotary embedding; positions are counted from the start of the document.
        sin_B1TE: Sines of the rotary embedding.
    """

    mask_B1TT: Tensor
    cos_B1TE: Tensor
    sin_B1TE: Tensor

    @classmethod
    def of_documents(cls, document_BT: Tensor, *, head_size: int) -> AttentionContext:
        """Return mask and rotary embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864, eq. 34)."""
        position_BT = positions(document_BT)
        same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
        frequency_E = _ROTARY_BASE ** -(torch.arange(0, head_size, 2, device=document_BT.device) / head_size)
        angle_BTE = (position_BT[:, :, None] * frequency_E).repeat(1, 1, 2)
        return cls(
            mask_B1TT=same_BTT.tril()[:, None],
            cos_B1TE=angle_BTE.cos()[:, None],
            sin_B1TE=angle_BTE.sin()[:, None],
        )

    def apply_rotary(self, x_BATE: Tensor) -> Tensor:
        """Rotate pairs of dimensions of queries or keys, by angles that grow with the token's position."""
        first, second = x_BATE.chunk(2, dim=-1)
        return x_BATE * self.cos_B1TE + torch.cat([-second, first], dim=-1) * self.sin_B1TE


def positions(document_BT: Tensor) -> Tensor:
    """Return the position of each token in its document, counted from 0, int64 `[B, T]`."""
    index_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    return index_T - (~same_as_previous(document_BT) * index_T).cummax(dim=1).values


class Layer(nn.Module):
    """Adds self-attention and then a feed-forward network, each after a norm, to the residual stream."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        """Return the residual stream after this layer."""
        x_BTD = x_BTD + self._attention(self.attention_norm(x_BTD), context)
        feed_forward_BTD: Tensor = self.down(F.gelu(self.up(self.feed_forward_norm(x_BTD))))
        return x_BTD + feed_forward_BTD

    def _attention(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        rows, length, width = x_BTD.shape
        split = self.query_key_value(x_BTD).view(rows, length, 3, self.heads, width // self.heads)
        query_BATE, key_BATE, value_BATE = split.permute(2, 0, 3, 1, 4).unbind()
        mixed_BATE = F.scaled_dot_product_attention(
            context.apply_rotary(query_BATE),
            context.apply_rotary(key_BATE),
            value_BATE,
            attn_mask=context.mask_B1TT,
        )
        out_BTD: Tensor = self.out(mixed_BATE.transpose(1, 2).reshape(rows, length, width))
        return out_BTD
