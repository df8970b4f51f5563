"""`parallel` heads: each head is one decoder layer that reads the states of the trunk.

The trunk is the base model without its last layer. Head 1 is the pretrained last layer, and heads 2..K start
as copies of this layer (Gloeckle et al. 2024, section 2).

Shape letters: B rows, T positions, S cached and new tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.families import anatomy, body_states, layers_of, with_layers
from weighted_mtp_core.model.heads import Heads, SplitModel
from weighted_mtp_core.model.heads.one_layer_body import one_layer_body
from weighted_mtp_core.recipe.schema import HeadsTable
from weighted_mtp_core.runtime.fsdp import copy_of


class ParallelHeads(Heads):
    """Heads that are bodies of one layer and read the trunk's states instead of embeddings."""

    kind = "parallel"

    @classmethod
    def split(cls, base: Any, *, n_future: int, table: HeadsTable) -> SplitModel:
        """Remove the last layer and the final norm from the body, which becomes the trunk.

        Raises:
            WmtpError: The model has only one layer, does not consist of layers and a final norm, or has a
                last layer that cannot be run without the other layers.
        """
        del table
        body, layers_name, norm_name = anatomy(base)
        layers, norm = getattr(body, layers_name), getattr(body, norm_name)
        if len(layers) < 2:
            raise WmtpError(
                "a model of one layer has no trunk left when its last layer becomes the head",
                hint='use a deeper model, or `model.heads.kind = "medusa"`',
            )
        last = layers[-1]
        config = with_layers(body.config, slice(-1, None))
        heads = cls(
            one_layer_body(
                body,
                last if k == 0 else copy_of(last),
                config=config,
                layers_name=layers_name,
                norm_name=norm_name,
            )
            for k in range(n_future)
        )
        setattr(body, layers_name, layers[:-1])
        setattr(body, norm_name, nn.Identity())
        body.config = with_layers(body.config, slice(0, -1))
        return SplitModel(trunk=body, heads=heads, norm=norm)

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
        """Return head k's states `[B, T, H]`."""
        del embedded_BTH
        return body_states(
            self[k - 1], inputs_embeds=hidden_BTH, position_BT=position_BT, cache=cache, seen_BS=seen_BS
        )

    def layer(self, k: int) -> nn.Module:
        """Return head k's decoder layer."""
        return layers_of(self[k - 1])[0]

    @property
    def bodies(self) -> Sequence[nn.Module]:
        """All heads, because each head is a transformers model of one layer."""
        return tuple(self)

    def rejoin(self, base: Any, *, trunk: nn.Module, norm: nn.Module) -> None:
        """Put the trunk's layers, the layer of head 1 and the norm into a causal LM."""
        body, layers_name, norm_name = anatomy(base)
        super().rejoin(base, trunk=trunk, norm=norm)
        setattr(body, layers_name, nn.ModuleList([*layers_of(trunk), self.layer(1)]))
        setattr(body, norm_name, norm)
