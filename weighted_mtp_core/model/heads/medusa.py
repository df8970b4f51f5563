"""`medusa` heads: the trunk is the whole body, head 1 is the identity, and heads 2..K are residual blocks.

A block computes `h + silu(W h)` from the trunk's state h with a matrix W (Medusa, Cai et al. 2024, section
3.1). All heads share the model's unembedding. vLLM can draft with `medusa` heads.

Shape letters: B rows, T positions, S cached and new tokens, H hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from weighted_mtp_core.model.families import body_of
from weighted_mtp_core.model.heads import Heads, SplitModel
from weighted_mtp_core.recipe.schema import HeadsTable


class MedusaHeads(Heads):
    """Head 1 is the identity; heads 2..K are residual blocks, which also start as the identity."""

    kind = "medusa"
    pointwise = True

    @classmethod
    def split(cls, base: Any, *, n_future: int, table: HeadsTable) -> SplitModel:
        """Use the whole body, including its final norm, as the trunk."""
        del table
        body = body_of(base)
        width = int(base.get_output_embeddings().weight.shape[1])
        heads = cls([nn.Identity(), *(MedusaHead(width) for _ in range(n_future - 1))])
        return SplitModel(trunk=body, heads=heads, norm=nn.Identity())

    def run(
        self,
        k: int,
        hidden_BTH: Tensor,
        *,
        embedded_BTH: Tensor | None = None,
        position_BT: Tensor | None = None,
        cache: Any = None,
        seen_BS: Tensor | None = None,
    ) -> Tensor:
        """Return head k's states `[B, T, H]`; a state depends only on the trunk's state at its position."""
        del embedded_BTH, position_BT, cache, seen_BS
        states: Tensor = self[k - 1](hidden_BTH)
        return states

    def layer(self, k: int) -> nn.Module:
        """Return head k."""
        return self[k - 1]


class MedusaHead(nn.Module):
    """Computes `h + silu(W h)`, which is the identity before training because W starts at 0."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.linear.weight)

    @property
    def mlp(self) -> nn.Module:
        """The module that is computed only at the positions whose states are read, see `sparse_rows`."""
        return self.linear

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Return states `[B, T, H]`."""
        return hidden_BTH + nn.functional.silu(self.linear(hidden_BTH))
