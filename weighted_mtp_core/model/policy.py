"""The policy: a trunk, K heads and one shared unembedding, made from any transformers causal LM.

Head 1 is the ordinary language model. With `transformer` heads the trunk is every layer but the last, and
each head is one layer of the trunk's own kind: head 1 the pretrained last layer, the others copies of it
(Gloeckle et al. 2024, section 2). With `linear` heads the trunk is the whole body, head 1 the identity and
the others residual blocks that start as identity (Medusa, Cai et al. 2024, section 3.1).

Rows are right-padded. Where each holds one document, causal attention needs no mask; where positions start
anew within a row, transformers keeps what lies before and behind apart.

Shape letters: B rows, T positions, K heads, H hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from attrs import frozen
from torch import Tensor, nn

from weighted_mtp_core.api import Batch
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.feed_forward import once_a_row, only_at

HeadKind = Literal["transformer", "linear"]
_TOLERANCE = 1e-4  # of head 1's logits against the base model's, fp32


@frozen(kw_only=True, eq=False)
class PolicyCache:
    """Key-value caches of the trunk and of each transformer head, transformers `DynamicCache` objects."""

    trunk: Any
    heads: tuple[Any, ...]


class Policy(nn.Module):
    """Trunk, heads and unembedding.

    Attributes:
        n_future: K.
        head_kind: `transformer` or `linear`.
        hidden_size: H.
        vocab_size: V.
        trunk: The shared body.
        heads: One module a head; with linear heads, head 1 is the identity.
        norm: The final norm of transformer heads; the identity with linear heads, whose trunk ends in it.
        unembedding: Shared by all heads.
    """

    def __init__(self, base: Any, *, n_future: int, head_kind: HeadKind) -> None:
        """Take a causal LM apart; its modules are used, not copied.

        Raises:
            WmtpError: The model is not built of layers and a final norm, or head 1 would not equal it.
        """
        super().__init__()
        body, layers_name, norm_name = _anatomy(base)
        layers = getattr(body, layers_name)
        self.n_future = n_future
        self.head_kind = head_kind
        self.config = base.config
        self.hidden_size = int(body.config.hidden_size)
        self.unembedding: nn.Linear = base.get_output_embeddings()
        self.vocab_size = int(self.unembedding.weight.shape[0])
        if self.unembedding.bias is not None:
            raise WmtpError("the base model's unembedding has a bias, which multi-token heads do not share")
        if head_kind == "linear":
            self.norm: nn.Module = nn.Identity()
            self.heads = nn.ModuleList(
                [nn.Identity() if k == 0 else ResidualHead(self.hidden_size) for k in range(n_future)]
            )
        else:
            if len(layers) < 2:
                raise WmtpError(
                    "a model of one layer has no trunk left when its last layer becomes the head",
                    hint='use a deeper model, or `model.head = "linear"`',
                )
            self.norm = getattr(body, norm_name)
            last = layers[-1]
            setattr(body, layers_name, layers[:-1])
            setattr(body, norm_name, nn.Identity())
            self.heads = nn.ModuleList(
                [
                    _one_layer_body(
                        body,
                        last if k == 0 else copy.deepcopy(last),
                        layers_name=layers_name,
                        norm_name=norm_name,
                    )
                    for k in range(n_future)
                ]
            )
            body.config = _with_layers(body.config, len(layers) - 1)
        self.trunk: nn.Module = body

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
            position_BT: Positions, where they are not 0, 1, ... or the cache's continuation; in training,
                tokens whose position is not one above their neighbour's begin another document.
            cache: The trunk's cache; extended in place.
            seen_BS: Which of the cached and new tokens may be looked at, where that is not all of them.
        """
        states: Tensor = self.trunk(
            input_ids=ids_BT,
            attention_mask=seen_BS,
            position_ids=position_BT,
            past_key_values=_memory(cache, position_BT),
            use_cache=cache is not None,
        ).last_hidden_state
        return states

    def head_states(
        self,
        k: int,
        hidden_BTH: Tensor,
        *,
        position_BT: Tensor | None = None,
        cache: Any = None,
        seen_BS: Tensor | None = None,
    ) -> Tensor:
        """Return what head k (from 1) hands to the unembedding, `[B, T, H]`; see `trunk_states`."""
        states = self.head_outputs(k, hidden_BTH, position_BT=position_BT, cache=cache, seen_BS=seen_BS)
        normed: Tensor = self.norm(states)
        return normed

    def head_outputs(
        self,
        k: int,
        hidden_BTH: Tensor,
        *,
        position_BT: Tensor | None = None,
        cache: Any = None,
        seen_BS: Tensor | None = None,
    ) -> Tensor:
        """Return head k's states `[B, T, H]` before the final norm."""
        head = self.heads[k - 1]
        if self.head_kind == "linear":
            linear: Tensor = head(hidden_BTH)
            return linear
        outputs: Tensor = head(
            inputs_embeds=hidden_BTH,
            attention_mask=seen_BS,
            position_ids=position_BT,
            past_key_values=_memory(cache, position_BT),
            use_cache=cache is not None,
        ).last_hidden_state
        return outputs

    def asked_of_head(self, k: int, index_N: Tensor) -> AbstractContextManager[None]:
        """Within, only some of head k's states will be read, so only those are computed to the end.

        Args:
            k: From 1.
            index_N: The places that are read, int64 into the flattened `[B, T]`; other states are not right.
        """
        return only_at(self.layer(k), index_N)

    def asked_in_each_row(self, k: int, index_B: Tensor) -> AbstractContextManager[None]:
        """Within, one of head k's states will be read in each row: `asked_of_head`, for a few tokens."""
        return once_a_row(self.layer(k), index_B)

    def layer(self, k: int) -> nn.Module:
        """Return the one layer of transformer head k, from 1; of linear heads, the head."""
        head = self.heads[k - 1]
        return head if self.head_kind == "linear" else layers_of(head)[0]

    def logits(self, k: int, hidden_BTH: Tensor) -> Tensor:
        """Return head k's logits `[B, T, V]`; training never makes them whole."""
        logits: Tensor = self.unembedding(self.head_states(k, hidden_BTH))
        return logits

    def recompute_activations(self) -> None:
        """From now on, training keeps only the inputs of decoder layers and computes the rest again backward.

        Raises:
            WmtpError: The model's layers cannot do that.
        """
        bodies: list[Any] = [self.trunk, *self.heads] if self.head_kind == "transformer" else [self.trunk]
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
                # Else layers drop the cache that keeps nothing, and warn that they do.
                setattr(module, "_can_checkpoint_with_cache", True)  # noqa: B010 - as below

    def new_caches(self) -> PolicyCache:
        """Return empty caches of the trunk and of each transformer head."""
        from transformers import DynamicCache

        heads = self.n_future if self.head_kind == "transformer" else 0
        return PolicyCache(trunk=DynamicCache(), heads=tuple(DynamicCache() for _ in range(heads)))

    def frozen_trunk(self) -> Callable[[Batch], Tensor]:
        """Return a copy of the trunk as it is now: from a batch to float32 states, without gradients."""
        trunk = copy.deepcopy(self.trunk).eval().requires_grad_(requires_grad=False)

        @torch.no_grad()
        def states(batch: Batch) -> Tensor:
            hidden: Tensor = trunk(
                input_ids=batch.ids_BT, position_ids=batch.position_BT, use_cache=False
            ).last_hidden_state
            return hidden.float()

        return states


def layers_of(body: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a trunk or of a transformer head, which has one."""
    (layers,) = (child for child in body.children() if isinstance(child, nn.ModuleList))
    return layers


def _memory(cache: Any, position_BT: Tensor | None) -> Any:
    """Return the cache, or without one and without positions a cache that keeps nothing.

    With no cache at all, transformers looks into the positions that it made itself for packed documents, and
    so waits for an accelerator in every forward pass of every body.
    """
    return _keep_nothing() if cache is None and position_BT is None else cache


@functools.cache
def _keep_nothing() -> Any:
    from transformers import DynamicCache

    class KeepNothing(DynamicCache):  # type: ignore[misc] # transformers gives it no type
        def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return key, value

    return KeepNothing()


class ResidualHead(nn.Module):
    """`h + W silu(U h)`, the identity at first because W starts at 0."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, hidden_size, bias=False)
        self.outer = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Return states `[B, T, H]`."""
        result: Tensor = hidden_BTH + self.outer(nn.functional.silu(self.inner(hidden_BTH)))
        return result


def make_policy(base: Any, *, n_future: int, head_kind: HeadKind) -> Policy:
    """Make a policy of a causal LM and check that head 1 still is that model.

    Raises:
        WmtpError: The model's kind does not fit this kind of head.
    """
    ids_BT = torch.arange(2, 10).remainder(int(base.config.vocab_size)).unsqueeze(0)
    was_training = base.training
    base.eval()
    with torch.no_grad():
        expected = base(input_ids=ids_BT, use_cache=False).logits.float()
        policy = Policy(base, n_future=n_future, head_kind=head_kind).eval()
        hidden_BTH = policy.trunk_states(ids_BT)
        actual = policy.logits(1, hidden_BTH).float()
        asked_N = torch.tensor([2, 5])
        with policy.asked_of_head(1, asked_N):
            actual[:, asked_N] = policy.logits(1, hidden_BTH)[:, asked_N].float()
    policy.train(was_training)
    gap = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if gap > _TOLERANCE:
        raise WmtpError(
            f"head 1 of a `{base.config.model_type}` model with `{head_kind}` heads is not the model itself "
            f"(logits differ by {gap:.2g})",
            hint='try `model.head = "linear"`' if head_kind == "transformer" else "use another base model",
        )
    return policy


def language_model(policy: Policy) -> Any:
    """Return trunk, head 1 and unembedding as the transformers model that `make_policy` takes apart.

    Its modules are the policy's own, so it costs no memory. It is to be saved, not run: its last layer still
    believes to be the first.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(copy.deepcopy(policy.config))
    body, layers_name, norm_name = _anatomy(base)
    for name, child in policy.trunk.named_children():
        setattr(body, name, child)
    if policy.head_kind == "transformer":
        last = getattr(policy.heads[0], layers_name)
        setattr(body, layers_name, nn.ModuleList([*getattr(policy.trunk, layers_name), *last]))
        setattr(body, norm_name, policy.norm)
    base.set_output_embeddings(policy.unembedding)
    return base


def _anatomy(base: Any) -> tuple[Any, str, str]:
    """Return the body of a causal LM and the names of its layers and its final norm."""
    body = base.base_model
    layers = [name for name, child in body.named_children() if isinstance(child, nn.ModuleList)]
    norms = [
        name
        for name, child in body.named_children()
        if "norm" in type(child).__name__.lower() and not isinstance(child, nn.ModuleList)
    ]
    if len(layers) != 1 or not norms:
        raise WmtpError(
            f"a `{base.config.model_type}` model is not a stack of layers with a final norm, "
            "so it cannot be a trunk"
        )
    return body, layers[0], norms[-1]


def _with_layers(config: Any, count: int) -> Any:
    """Return a copy of a model config for another number of layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = list(config.layer_types)[-count:] if count == 1 else config.layer_types[:count]
    return config


def _one_layer_body(body: Any, layer: nn.Module, *, layers_name: str, norm_name: str) -> nn.Module:
    """Return a body of the same kind with this one layer, fed by states instead of embeddings."""
    head: nn.Module = type(body)(_with_layers(body.config, 1))
    for name, child in list(head.named_children()):
        if isinstance(child, nn.Embedding):
            # Learned positions are in the trunk's states already; the body would add them again.
            is_position = child.num_embeddings != body.config.vocab_size
            setattr(head, name, _ZeroEmbedding(child.embedding_dim) if is_position else nn.Identity())
        elif name == norm_name:
            setattr(head, name, nn.Identity())
        elif name == layers_name:
            setattr(head, name, nn.ModuleList([layer]))
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, "layer_idx", 0)  # noqa: B010 - an attribute that nn.Module's type does not know
    return head


class _ZeroEmbedding(nn.Module):
    """Stands where a body adds learned positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, positions: Tensor) -> Tensor:
        """Return zeros `[..., H]`."""
        return torch.zeros(*positions.shape, self.width, device=positions.device)
