"""The kinds of heads, each in a file of its own.

A kind of heads defines which part of the base model becomes the trunk, what head 1 is and how heads 2..K are
initialised. To add a kind, write a subclass of `Heads`; then list the class in `model.policy.HEADS`, and the
name of the kind among the values of the recipe's `model.heads.kind`.

Shape letters: B rows, T positions, S cached and new tokens, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from attrs import frozen
from torch import Tensor, nn

from weighted_mtp_core.model.families import body_of
from weighted_mtp_core.model.sparse_feed_forward import sparse_rows
from weighted_mtp_core.recipe.schema import HeadKind, HeadsTable


@frozen(kw_only=True, eq=False)
class SplitModel:
    """A causal LM's body, split into trunk, heads and norm; `norm` is between heads and unembedding."""

    trunk: nn.Module
    heads: Heads
    norm: nn.Module


@frozen(kw_only=True, eq=False)
class Text:
    """The text whose states the heads compute.

    Attributes:
        ids_BT: int64 token ids; None if the heads do not read tokens.
        position_BT: Positions, see `Policy.trunk_states`.
        trunk: The trunk, which embeds the tokens.
    """

    ids_BT: Tensor | None
    position_BT: Tensor | None
    trunk: Any

    def positions(self) -> Tensor:
        """Return the positions of the tokens, int64 `[B, T]`."""
        if self.position_BT is not None:
            return self.position_BT
        ids_BT = self._ids()
        return torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)

    def embedded(self) -> Tensor:
        """Return the embeddings `[B, T, H]` of the tokens."""
        embedded_BTH: Tensor = self.trunk.get_input_embeddings()(self._ids())
        return embedded_BTH

    def ahead(self, embedded_BTH: Tensor, distance: int) -> Tensor:
        """Return, for each position, the embedding of the token `distance` positions later, `[B, T, H]`.

        If the document ends before this token, the embedding is 0 or, without `position_BT`, the embedding of
        padding; no pair that counts depends on this embedding.
        """
        position_BT = self.positions()
        # `position_BT` restarts at 0 with each document and is 0 on padding, so no token after the end of a
        # document has the expected position.
        inside_BT = position_BT.roll(-distance, dims=1) == position_BT + distance
        return embedded_BTH.roll(-distance, dims=1).masked_fill(~inside_BT[:, :, None], 0.0)

    def _ids(self) -> Tensor:
        if self.ids_BT is None:
            raise ValueError("these heads read tokens: pass `ids_BT`")
        return self.ids_BT


class Heads(nn.ModuleList, ABC):
    """Heads 1..K: one module for each head, unless heads 2..K share a module.

    Head 1 gives the logits of the base model, so it is the identity or consists of modules of the base model.

    Attributes:
        kind: The value of the recipe's `model.heads.kind`.
        chained: Whether heads 3..K read the states of the previous head; otherwise all heads read the trunk's
            states.
        pointwise: Whether a head's state depends only on the trunk's state at the same position.
    """

    kind: ClassVar[HeadKind]
    chained: ClassVar[bool] = False
    pointwise: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def split(cls, base: Any, *, n_future: int, table: HeadsTable) -> SplitModel:
        """Split a causal LM into trunk, head 1 and norm without copying parameters, and make heads 2..K.

        Raises:
            WmtpError: The model cannot be split for this kind of head.
        """

    @abstractmethod
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
        """Return the states `[B, T, H]` of head k before the policy's norm.

        Args:
            k: Number of the head, from 1.
            hidden_BTH: The states that the head reads.
            embedded_BTH: For each position t, the embedding of the token x[t + k - 1]; only `sequential`
                heads read embeddings.
            position_BT: Positions, see `Policy.trunk_states`.
            cache: The head's cache, which is extended in place; `medusa` heads have no cache.
            seen_BS: Mask of cached and new tokens, see `Policy.trunk_states`.
        """

    def each(
        self,
        hidden_BTH: Tensor,
        *,
        n_future: int,
        text: Text,
        rows: Sequence[Tensor] | None = None,
        detach: bool = False,
    ) -> Iterator[Tensor]:
        """Yield the states `[B, T, H]` of heads 1..K before the policy's norm.

        Args:
            hidden_BTH: The trunk's states.
            n_future: K.
            text: The text from which the trunk computed its states.
            rows: For each head, the positions at which the caller reads states, as int64 indices `[N]` into
                the flattened `[B, T]`; None means all positions. States at positions that are not in `rows`
                may be wrong.
            detach: Whether the trunk's states are detached before heads 2..K read them.
        """
        for k in range(1, n_future + 1):
            source_BTH = hidden_BTH.detach() if detach and k > 1 else hidden_BTH
            with nullcontext() if rows is None else sparse_rows(self.layer(k), rows[k - 1]):
                yield self.run(k, source_BTH, position_BT=text.position_BT)

    @abstractmethod
    def layer(self, k: int) -> nn.Module:
        """Return the decoder layer of head k (from 1), or the whole module if it has no decoder layer."""

    @property
    def bodies(self) -> Sequence[nn.Module]:
        """The transformers models (bodies) that the heads contain; `medusa` heads contain none."""
        return ()

    @property
    def projections(self) -> Sequence[nn.Module]:
        """The linear layers outside the decoder layers of `sequential` heads; empty for other heads."""
        return ()

    def caches(self, n_future: int) -> int:
        """Return the number of key-value caches that `n_future` heads need."""
        del n_future
        return len(self.bodies)

    def rejoin(self, base: Any, *, trunk: nn.Module, norm: nn.Module) -> None:
        """Put trunk, head 1 and norm into a causal LM of the base model's class; this reverses `split`."""
        del norm
        body = body_of(base)
        for name, parameter in trunk.named_parameters(recurse=False):
            setattr(body, name, parameter)
        for name, buffer in trunk.named_buffers(recurse=False):
            setattr(body, name, buffer)
        for name, child in trunk.named_children():
            setattr(body, name, child)
