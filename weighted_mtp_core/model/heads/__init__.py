"""The kinds of heads, one file each.

A kind defines which part of the base model becomes the trunk, what head 1 is and how heads 2..K are
initialised. Another kind is a subclass of `Heads`, listed in `model.policy.HEADS` and in the recipe's
`model.heads.kind`.

Shape letters: B rows, T positions, S cached and new tokens, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from attrs import frozen
from torch import Tensor, nn

from weighted_mtp_core.model.families import body_of

HeadKind = Literal["parallel", "medusa"]


@frozen(kw_only=True, eq=False)
class SplitModel:
    """The parts of a causal LM's body; `norm` is applied between heads and unembedding."""

    trunk: nn.Module
    heads: Heads
    norm: nn.Module


class Heads(nn.ModuleList, ABC):
    """Heads 1..K, one module each; head 1 is part of the base model.

    Attributes:
        kind: The value of the recipe's `model.heads.kind`.
    """

    kind: ClassVar[HeadKind]

    @classmethod
    @abstractmethod
    def split(cls, base: Any, *, n_future: int) -> SplitModel:
        """Split a causal LM into its parts and make K heads; the modules of the model are not copied.

        Raises:
            WmtpError: The model cannot be split for this kind of head.
        """

    @abstractmethod
    def run(
        self,
        k: int,
        hidden_BTH: Tensor,
        *,
        position_BT: Tensor | None = None,
        cache: Any = None,
        seen_BS: Tensor | None = None,
    ) -> Tensor:
        """Return head k's (from 1) states `[B, T, H]` before the final norm; see `Policy.trunk_states`."""

    @abstractmethod
    def layer(self, k: int) -> nn.Module:
        """Return the module that computes head k (from 1); for a body, its only layer."""

    @property
    def bodies(self) -> Sequence[nn.Module]:
        """The heads that are transformers bodies, with a key-value cache each."""
        return ()

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
