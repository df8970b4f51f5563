"""Counts the operations (FLOPs) that a step of stage 2 needs, from the shapes of the policy's matrices.

Multiplying the state of one token by a matrix of P numbers takes 2 P operations. The backward pass takes 2 P
operations for the gradient with respect to the state and 2 P for the gradient with respect to the matrix, so
both passes take 6 P operations per token (Kaplan et al. 2020, section 2.1). A frozen matrix gets no gradient,
and a frozen part whose input needs no gradient has no backward pass. Attention takes 4 W operations per pair
of tokens in the forward pass and 8 W in the backward pass, where W is the width of all query heads together
(Chowdhery et al. 2022, appendix B). As in Chowdhery et al., all pairs of tokens of a document count, although
causal attention masks half of them; in layers with an attention window, only pairs in the window count.

The operations of trunk and heads are counted for every token of a document, except those of the feed-forward
networks that `sparse_feed_forward.py` computes only where their outputs are read. A network of a head, like
the unembedding, is counted for supervised pairs, that is, for each head and position with a target; a network
of the trunk is counted for positions with a target of any head. The count leaves out padding, recomputed
activations and logits, norms, recurrences of state-space layers, the weighting and the critic.

Shape letters: D documents, K heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from weighted_mtp_core.model.families import layers_of, text_config
from weighted_mtp_core.model.policy import Policy

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE_EXPERTS = ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_topk", "moe_k")


@frozen(kw_only=True)
class StepFlops:
    """The operations of a step per token, source, supervised pair, and pair of tokens in attention.

    Attributes:
        per_token: Operations for each token of a document.
        per_source: Operations for each position that is the source of a supervised pair of any head.
        per_pair_K: For each head, the operations for a supervised pair of the head.
        attention: For each attention layer, the operations for a pair of tokens, and the maximum number of
            tokens to which a token attends; None means all tokens of the document.
    """

    per_token: float
    per_source: float
    per_pair_K: tuple[float, ...]
    attention: tuple[tuple[float, int | None], ...]

    @classmethod
    def of(
        cls, policy: Policy, *, detach_trunk: bool = False, sparse_trunk: bool = False
    ) -> StepFlops | None:
        """Count the operations of a policy, in which exactly the trained parameters require a gradient.

        Args:
            policy: The policy.
            detach_trunk: `loss.detach_trunk` of the recipe.
            sparse_trunk: See `Signals.sparse_trunk`.

        Returns:
            The operations; None if it is unknown which share of the policy's experts computes a token.
        """
        share = _active_share(policy)
        if share is None:
            return None
        trunk_learns = _learns(policy.trunk)
        per_source = 0.0
        if sparse_trunk:
            per_source = _network_operations(layers_of(policy.trunk)[-1], share, passes=trunk_learns)
        per_token = _operations(policy.trunk, share, passes=trunk_learns) - per_source
        attention = list(_attention(policy.trunk, passes=trunk_learns))
        per_pair_K = []
        for k in range(1, policy.n_future + 1):
            head = policy.heads[min(k, len(policy.heads)) - 1]
            detached = detach_trunk and k > 1
            passes = _learns(head) or (trunk_learns and not detached)
            skips = not policy.heads.chained or k == policy.n_future
            sparse = _network_operations(policy.heads.layer(k), share, passes=passes) if skips else 0.0
            per_token += _operations(head, share, passes=passes) - sparse
            attention += [each for body in head.modules() for each in _attention(body, passes=passes)]
            matrix = policy.unembedding.weight
            trained = matrix.requires_grad and not detached
            per_pair_K.append(sparse + matrix.numel() * _factor(trained=trained, passes=passes))
        return cls(
            per_token=per_token,
            per_source=per_source,
            per_pair_K=tuple(per_pair_K),
            attention=tuple(attention),
        )

    def of_batch(self, length_D: NDArray[np.int64], pairs_K: Sequence[int], *, sources: int) -> float:
        """Return the number of operations for a batch.

        Args:
            length_D: The number of tokens of each document.
            pairs_K: The number of supervised pairs of each head.
            sources: The number of positions that are the source of a supervised pair of any head.
        """
        attended = (
            operations * float((length_D * np.minimum(length_D, window or length_D)).sum())
            for operations, window in self.attention
        )
        supervised = sum(each * count for each, count in zip(self.per_pair_K, pairs_K, strict=True))
        everywhere = self.per_token * float(length_D.sum())
        return everywhere + self.per_source * sources + supervised + sum(attended)


def _factor(*, trained: bool, passes: bool) -> int:
    """Return the operations that each number of a matrix needs per token.

    `trained` means that the matrix gets a gradient; `passes` means that the matrix's input gets a gradient.
    """
    return 2 + 2 * trained + 2 * passes


def _learns(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _operations(part: nn.Module, share: float, *, passes: bool) -> float:
    """Return a module's operations per token; `share` is the share of the experts that compute a token."""
    return sum(size * _factor(trained=trained, passes=passes) for size, trained in _matrices(part, share))


def _network_operations(layer: nn.Module, share: float, *, passes: bool) -> float:
    """Return the operations per position of the network to which `sparse_rows` applies."""
    network = getattr(layer, "mlp", None)
    return 0.0 if network is None else _operations(network, share, passes=passes)


def _matrices(part: nn.Module, share: float) -> Iterator[tuple[float, bool]]:
    """Yield, for each matrix except embeddings, how many numbers a token uses, and whether it is trained."""
    for module in part.modules():
        if isinstance(module, nn.Linear):  # not from the shape, which for a 4-bit matrix is that of its bytes
            yield module.in_features * module.out_features, module.weight.requires_grad
        elif not isinstance(module, nn.Embedding):
            for parameter in _own_matrices(module):
                active = share if _stacks_experts(module, parameter) else 1.0
                yield parameter.numel() * active, parameter.requires_grad


def _own_matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield a module's own parameters with at least two dimensions, except the biases of experts."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 2 and not name.endswith("bias"):
            yield parameter


def _stacks_experts(module: nn.Module, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 3 and not isinstance(module, _ConvNd)


def _active_share(policy: Policy) -> float | None:
    """Return the share of experts that compute a token: 1 without experts, None if the share is unknown."""
    stacked = any(
        _stacks_experts(module, each) for module in policy.modules() for each in _own_matrices(module)
    )
    other = any(_has_other_experts(*each) for each in policy.named_modules())
    if not stacked and not other:
        return 1.0
    config = text_config(policy.config)
    count, active = (_number(config, names) for names in (_EXPERTS, _ACTIVE_EXPERTS))
    return active / count if count and active and not other else None


def _has_other_experts(name: str, module: nn.Module) -> bool:
    """Return whether a module stores experts in another form than as a parameter `[experts, ...]`."""
    if "experts" not in name.split("."):
        return False
    if isinstance(module, nn.Linear):  # a router, or a child of a list of experts
        return False
    return isinstance(module, nn.ModuleList) or any(each.ndim == 2 for each in _own_matrices(module))


def _number(config: Any, names: Sequence[str]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((each for each in found if isinstance(each, int)), None)


def _attention(body: nn.Module, *, passes: bool) -> Iterator[tuple[float, int | None]]:
    """Yield the entries of `StepFlops.attention` for the layers of a transformers model."""
    config = getattr(body, "config", None)
    lists = [child for child in body.children() if isinstance(child, nn.ModuleList)]
    if config is None or not lists:
        return
    config = text_config(config)
    heads = _number(config, ["num_attention_heads"])
    if heads is None:
        return
    width = _number(config, ["qk_head_dim", "head_dim"]) or config.hidden_size // heads
    operations = 2.0 * heads * (width + (_number(config, ["v_head_dim"]) or width)) * (3 if passes else 1)
    sliding = _number(config, ["sliding_window"]) if getattr(config, "use_sliding_window", True) else None
    windows = {
        "full_attention": None,
        "sliding_attention": sliding,
        "chunked_attention": _number(config, ["attention_chunk_size"]),
    }
    default = "full_attention" if sliding is None else "sliding_attention"
    for kind in getattr(config, "layer_types", None) or [default] * config.num_hidden_layers:
        if kind in windows:
            yield operations, windows[kind]
