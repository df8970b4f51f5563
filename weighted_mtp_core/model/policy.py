"""The policy: a trunk, K heads and one shared unembedding, made from any transformers causal LM.

Head 1 is the ordinary language model. What the trunk and the heads are depends on the kind of head: see
`heads/`.

Rows are right-padded. Where each row holds one document, causal attention needs no mask. Where rows hold
several, positions start again at 0 with each document, and transformers keeps the documents apart.

Shape letters: B rows, T positions, S cached and new tokens, K heads, H hidden, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.families import body_states
from weighted_mtp_core.model.heads import HeadKind, Heads
from weighted_mtp_core.model.heads.linear import LinearHeads
from weighted_mtp_core.model.heads.transformer import TransformerHeads
from weighted_mtp_core.model.sparse_feed_forward import one_position_per_row, sparse_rows

HEADS: dict[HeadKind, type[Heads]] = {each.kind: each for each in (TransformerHeads, LinearHeads)}
_TOLERANCE = 1e-4  # of head 1's logits against the base model's, fp32


@frozen(kw_only=True, eq=False)
class PolicyCache:
    """Key-value caches of the trunk and of each transformer head, transformers `DynamicCache` objects."""

    trunk: Any
    heads: tuple[Any, ...]


class Policy(nn.Module):
    """Trunk, heads and unembedding.

    Args:
        base: A transformers causal LM; its modules are used, not copied.
        n_future: K.
        head_kind: `transformer` or `linear`.

    Attributes:
        n_future: K.
        config: The base model's config.
        hidden_size: H.
        vocab_size: V.
        trunk: The shared body.
        heads: Heads 1..K.
        norm: Stands between heads and unembedding.
        unembedding: Shared by all heads.

    Raises:
        WmtpError: The model is not built of layers and a final norm, or this kind of head does not fit it.
    """

    def __init__(self, base: Any, *, n_future: int, head_kind: HeadKind) -> None:
        super().__init__()
        self.unembedding: nn.Linear = base.get_output_embeddings()
        if self.unembedding.bias is not None:
            raise WmtpError("the base model's unembedding has a bias, which multi-token heads do not share")
        self.n_future = n_future
        self.config = base.config
        self.hidden_size = int(base.base_model.config.hidden_size)
        self.vocab_size = int(self.unembedding.weight.shape[0])
        split = HEADS[head_kind].split(base, n_future=n_future)
        # The order in which modules are assigned is that of `parameters()`, and so of sums over them.
        self.norm = split.norm
        self.heads = split.heads
        self.trunk = split.trunk

    @property
    def head_kind(self) -> HeadKind:
        """`transformer` or `linear`."""
        return self.heads.kind

    def trunk_states(
        self,
        ids_BT: Tensor,
        *,
        position_BT: Tensor | None = None,
        cache: Any = None,
        seen_BS: Tensor | None = None,
    ) -> Tensor:
        """Return the trunk's states `[B, T, H]` of token ids.

        Args:
            ids_BT: int64 token ids.
            position_BT: int64 positions, if they are not 0, 1, ... or the cache's continuation. In training,
                a token whose position is not one above the previous token's begins another document.
            cache: The trunk's cache; extended in place.
            seen_BS: bool, the cached and new tokens that may be attended to; None means all.
        """
        return body_states(
            self.trunk, input_ids=ids_BT, position_BT=position_BT, cache=cache, seen_BS=seen_BS
        )

    def head_outputs(
        self,
        k: int,
        hidden_BTH: Tensor,
        *,
        position_BT: Tensor | None = None,
        cache: Any = None,
        seen_BS: Tensor | None = None,
    ) -> Tensor:
        """Return head k's (from 1) states `[B, T, H]` before the final norm; see `trunk_states`."""
        return self.heads.run(k, hidden_BTH, position_BT=position_BT, cache=cache, seen_BS=seen_BS)

    def head_states(
        self, k: int, hidden_BTH: Tensor, *, position_BT: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """Return the states `[B, T, H]` that the unembedding reads for head k; see `trunk_states`."""
        normed: Tensor = self.norm(self.head_outputs(k, hidden_BTH, position_BT=position_BT, cache=cache))
        return normed

    def logits(self, k: int, hidden_BTH: Tensor) -> Tensor:
        """Return head k's logits `[B, T, V]`; training never makes them whole."""
        logits: Tensor = self.unembedding(self.head_states(k, hidden_BTH))
        return logits

    def sparse_rows(self, k: int, index_N: Tensor) -> AbstractContextManager[None]:
        """Inside this context, head k's states are correct only at `index_N` and cost less.

        Args:
            k: Head, from 1.
            index_N: int64 positions in the flattened `[B, T]`.
        """
        return sparse_rows(self.heads.layer(k), index_N)

    def one_position_per_row(self, k: int, index_B: Tensor) -> AbstractContextManager[None]:
        """The same as `sparse_rows` for one position of each row; faster if rows are short."""
        return one_position_per_row(self.heads.layer(k), index_B)

    def new_caches(self) -> PolicyCache:
        """Return empty caches of the trunk and of each transformer head."""
        from transformers import DynamicCache

        return PolicyCache(trunk=DynamicCache(), heads=tuple(DynamicCache() for _ in self.heads.bodies))

    def recompute_activations(self) -> None:
        """From now on, keep only the inputs of decoder layers in training and recompute the rest in backward.

        Raises:
            WmtpError: The model's layers do not support it.
        """
        bodies: list[Any] = [self.trunk, *self.heads.bodies]
        try:
            for body in bodies:
                body.activation_checkpointing_enable()
        except ValueError as error:
            raise WmtpError(
                f"a `{self.config.model_type}` model cannot compute activations again: {error}",
                hint="set `model.activation_checkpointing = false`",
            ) from error
        for module in self.modules():
            if hasattr(module, "_can_checkpoint_with_cache"):
                # Otherwise layers drop the cache that stores nothing, and warn about it.
                setattr(module, "_can_checkpoint_with_cache", True)  # noqa: B010 - nn.Module's type lacks it


def make_policy(base: Any, *, n_future: int, head_kind: HeadKind) -> Policy:
    """Make a policy of a causal LM and check that head 1 still is that model.

    Raises:
        WmtpError: The model's family does not fit this kind of head.
    """
    ids_BT = torch.arange(2, 10).remainder(int(base.config.vocab_size)).unsqueeze(0)
    was_training = base.training
    base.eval()
    with torch.no_grad():
        expected = base(input_ids=ids_BT, use_cache=False).logits.float()
        policy = Policy(base, n_future=n_future, head_kind=head_kind).eval()
        hidden_BTH = policy.trunk_states(ids_BT)
        actual = policy.logits(1, hidden_BTH).float()
        index_N = torch.tensor([2, 5])
        with policy.sparse_rows(1, index_N):
            actual[:, index_N] = policy.logits(1, hidden_BTH)[:, index_N].float()
    policy.train(was_training)
    gap = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if gap > _TOLERANCE:
        raise WmtpError(
            f"head 1 of a `{base.config.model_type}` model with `{head_kind}` heads is not the model itself "
            f"(logits differ by {gap:.2g})",
            hint='try `model.head = "linear"`' if head_kind == "transformer" else "use another base model",
        )
    return policy
