"""The policy: a trunk, K heads and a shared unembedding, made from a transformers causal LM.

Head 1 is the ordinary language model. The kind of head determines which layers form the trunk and the heads;
see `heads/`.

Rows are padded on the right. If each row contains one document, causal attention needs no mask. If rows
contain several documents, transformers separates the documents by their positions, which restart at 0 with
each document.

Shape letters: B rows, T positions, S cached and new tokens, K heads, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import islice
from typing import Any

from attrs import frozen
from torch import Tensor, nn
from torch.func import functional_call

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.families import body_states, layers_of, new_cache, one_layer_cache
from weighted_mtp_core.model.heads import Heads, Text
from weighted_mtp_core.model.heads.medusa import MedusaHeads
from weighted_mtp_core.model.heads.parallel import ParallelHeads
from weighted_mtp_core.model.heads.sequential import SequentialHeads
from weighted_mtp_core.model.sparse_feed_forward import sparse_rows
from weighted_mtp_core.model.unembedding import Unembedding
from weighted_mtp_core.recipe.schema import HeadKind, HeadsTable

HEADS: dict[HeadKind, type[Heads]] = {
    each.kind: each for each in (ParallelHeads, MedusaHeads, SequentialHeads)
}


@frozen(kw_only=True, eq=False)
class PolicyCache:
    """Key-value caches of the trunk and of the heads; each cache is a transformers `DynamicCache`."""

    trunk: Any
    heads: tuple[Any, ...]


class Policy(nn.Module):
    """A trunk, K heads and an unembedding that all heads share.

    Args:
        base: A transformers causal LM; its modules are used, not copied.
        unembedding: The unembedding of the base model.
        n_future: K.
        heads: Kind and options of the heads; `init` is not used.

    Attributes:
        n_future: K.
        heads_table: Kind and options of the heads; `init` is not used.
        base_class: The transformers class of the base model.
        config: The config of the base model.
        hidden_size: H.
        vocab_size: V.
        trunk: The base model's body, which computes the states that the heads read; some kinds of heads
            remove its last layer or its final norm.
        heads: Heads 1..K.
        norm: The module between heads and unembedding: the final norm for `parallel` heads, otherwise the
            identity.
        unembedding: The unembedding, which all heads share.
        shipped: The MTP layers of the base model that became heads 2..K; None if heads 2..K do not come from
            MTP layers.
        sparse_trunk: Whether `trunk_states` computes the feed-forward network of the trunk's last layer only
            at the positions whose states are read.

    Raises:
        WmtpError: The model does not consist of layers and a final norm, or does not work with this kind of
            head.
    """

    def __init__(self, base: Any, *, unembedding: Unembedding, n_future: int, heads: HeadsTable) -> None:
        super().__init__()
        self.unembedding = unembedding
        self.n_future = n_future
        self.heads_table = heads
        self.base_class = type(base)
        self.config = base.config
        self.hidden_size = int(unembedding.weight.shape[1])
        self.vocab_size = int(self.unembedding.weight.shape[0])
        self.shipped: Any = None
        self.sparse_trunk = False
        self._frozen = False
        split = HEADS[heads.kind].split(base, n_future=n_future, table=heads)
        # The order of assignment determines the order of `parameters()`, and so of sums over parameters.
        self.norm = split.norm
        self.heads = split.heads
        self.trunk = split.trunk

    def later_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of heads 2..K."""
        yield from self.heads[1:].parameters()

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the embeddings and of the unembedding, each once."""
        modules = [self.unembedding, *(each for each in self.modules() if isinstance(each, nn.Embedding))]
        yield from dict.fromkeys(parameter for each in modules for parameter in each.parameters())

    def freeze_base(self) -> None:
        """Freeze the base model, which then gets no gradient and no dropout; only heads 2..K are trained."""
        self.requires_grad_(requires_grad=False)
        for parameter in self.later_parameters():
            parameter.requires_grad = True
        self._frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Policy:  # noqa: FBT001, FBT002 - as nn.Module has it
        """Set training or evaluation mode; after `freeze_base`, the base stays in evaluation mode."""
        super().train(mode)
        if self._frozen:
            for part in (self.trunk, self.heads[0], self.norm):
                part.eval()
        return self

    @property
    def head_kind(self) -> HeadKind:
        """The kind of the heads: `parallel`, `medusa` or `sequential`."""
        return self.heads.kind

    @cached_property
    def has_dropout(self) -> bool:
        """Whether two calls on the same tokens can give different states in training mode.

        The answer is derived from the names and values of module attributes, such as the `p` of `nn.Dropout`.
        """
        return any(
            isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name or name == "p")
            for module in self.modules()
            for name, value in vars(module).items()
        )

    def trunk_states(
        self,
        ids_BT: Tensor,
        *,
        position_BT: Tensor | None = None,
        cache: Any = None,
        seen_BS: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return the trunk's states `[B, T, H]` for token ids.

        Args:
            ids_BT: int64 token ids.
            position_BT: int64 positions; None means 0, 1, ... or, with a cache, the positions after the
                cached tokens. Without a cache and `seen_BS`, a token begins a new document if its position is
                not the previous token's position plus 1.
            cache: The trunk's cache, which is extended in place.
            seen_BS: bool `[B, S]`, True for cached and new tokens that may be attended to, or a float mask
                `[B, 1, T, S]` that is added to attention scores; None means all tokens.
            rows: The positions at which the caller reads states, as int64 indices `[N]` into the flattened
                `[B, T]`; None means all positions. If `sparse_trunk` is true, other states may be wrong.
        """
        skipping: AbstractContextManager[None] = nullcontext()
        if rows is not None and self.sparse_trunk:
            skipping = sparse_rows(layers_of(self.trunk)[-1], rows)
        with skipping:
            return body_states(
                self.trunk, input_ids=ids_BT, position_BT=position_BT, cache=cache, seen_BS=seen_BS
            )

    def head_states(
        self,
        k: int,
        hidden_BTH: Tensor,
        *,
        ids_BT: Tensor | None = None,
        position_BT: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Return the states `[B, T, H]` that the unembedding reads for head k.

        For several `sequential` heads, `each_head_states` is faster, because each head needs the states of
        the previous head.

        Args:
            k: Number of the head, from 1.
            hidden_BTH: The trunk's states.
            ids_BT: The token ids of the trunk's states; only `sequential` heads read token ids.
            position_BT: Positions, see `trunk_states`.
            cache: A cache of the head, which is extended in place; only `parallel` heads use this argument.
        """
        if self.heads.chained:
            states = self.each_head_states(hidden_BTH, ids_BT=ids_BT, position_BT=position_BT)
            return next(islice(states, k - 1, None))
        normed: Tensor = self.norm(self.heads.run(k, hidden_BTH, position_BT=position_BT, cache=cache))
        return normed

    def each_head_states(
        self,
        hidden_BTH: Tensor,
        *,
        ids_BT: Tensor | None,
        position_BT: Tensor | None,
        rows: Sequence[Tensor] | None = None,
        detach: bool = False,
    ) -> Iterator[Tensor]:
        """Yield the states `[B, T, H]` that the unembedding reads for heads 1..K.

        Args:
            hidden_BTH: The trunk's states.
            ids_BT: Token ids, see `head_states`.
            position_BT: Positions, see `trunk_states`.
            rows: For each head, the positions at which the caller reads states, as int64 indices `[N]` into
                the flattened `[B, T]`; None means all positions. States at positions that are not in `rows`
                may be wrong. Unless heads are chained, compute a head's gradient before you request the next
                head's states.
            detach: Whether heads 2..K give a gradient only to the parameters of heads 2..K.
        """
        fixed = {name: parameter.detach() for name, parameter in self.norm.named_parameters()}
        text = Text(ids_BT=ids_BT, position_BT=position_BT, trunk=self.trunk)
        states = self.heads.each(hidden_BTH, n_future=self.n_future, text=text, rows=rows, detach=detach)
        for k, states_BTH in enumerate(states, start=1):
            if detach and k > 1:
                yield functional_call(self.norm, fixed, (states_BTH,))
            else:
                yield self.norm(states_BTH)

    def logits(self, k: int, hidden_BTH: Tensor, *, ids_BT: Tensor | None = None) -> Tensor:
        """Return head k's logits `[B, T, V]` in one tensor; training computes logits only in chunks."""
        logits: Tensor = self.unembedding(self.head_states(k, hidden_BTH, ids_BT=ids_BT))
        return logits

    def new_caches(self) -> PolicyCache:
        """Return empty caches of the trunk and of the heads."""
        heads = tuple(one_layer_cache(self.config) for _ in range(self.heads.caches(self.n_future)))
        return PolicyCache(trunk=new_cache(self.trunk.config), heads=heads)

    def recompute_activations(self) -> None:
        """Enable activation checkpointing: the backward pass recomputes layers from their stored inputs.

        Raises:
            WmtpError: The layers of the model do not support activation checkpointing.
        """
        # Chained heads always store only their inputs. A frozen body stores no activations, but with
        # activation checkpointing it would store the inputs of its layers.
        bodies: list[Any] = [self.trunk, *(() if self.heads.chained else self.heads.bodies)]
        bodies = [body for body in bodies if any(each.requires_grad for each in body.parameters())]
        # The backward pass would compute the layer at all positions.
        self.sparse_trunk = False
        try:
            for body in bodies:
                body.activation_checkpointing_enable()
        except ValueError as error:
            raise WmtpError(
                f"a `{self.config.model_type}` model does not support activation checkpointing: {error}",
                hint="set `model.activation_checkpointing = false`",
            ) from error
        for module in self.modules():
            if hasattr(module, "_can_checkpoint_with_cache"):
                # Otherwise transformers' layers drop the cache, which is empty here, and log a warning.
                setattr(module, "_can_checkpoint_with_cache", True)  # noqa: B010 - nn.Module's type lacks it
