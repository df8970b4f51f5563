"""Tensors that core and plugins exchange: a batch, what a weighting sees of it, weights, scores.

Shape letters: B batch rows, T positions, K heads (`n_future`), H hidden, V vocabulary.

Index convention: every `[B, T]` tensor is indexed *by the token itself*; `[B, T, K]` tensors are indexed
(source position t, head k) and line up with the target `x[b, t + k]`. Only the core shifts.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import field, frozen

if TYPE_CHECKING:
    from torch import Tensor


class Signal(enum.Enum):
    """What may be known about a batch; a weighting declares which of it the core must compute."""

    REWARD = "reward"
    VALUE = "value"
    GROUP = "group"
    TOKEN_LOSS = "token_loss"  # noqa: S105 - a kind of signal, no secret
    TOKEN_ENTROPY = "token_entropy"  # noqa: S105
    REFERENCE_LOSS = "reference_loss"


@frozen(kw_only=True, eq=False)
class Batch:
    """Rows of tokens with what is known about each token. All tensors live on one device.

    Attributes:
        ids_BT: int64 token ids; padding on the right.
        document_BT: int64 number of the document within its row, from 0; -1 on padding.
        response_BT: bool, True on response tokens (EOS included): the tokens that are targets.
        reward_BT: float32 reward of the response that a response token belongs to; 0 elsewhere.
        group_BT: int64, equal exactly for tokens of the same problem within this batch; -1 on padding.
        example_ids: The examples in the batch, row by row, for messages.
        position_BT: int64 position of each token in its document where rows hold several documents, 0 on
            padding; None where each row holds one, whose positions are 0, 1, ...
    """

    ids_BT: Tensor
    document_BT: Tensor
    response_BT: Tensor
    reward_BT: Tensor
    group_BT: Tensor
    example_ids: tuple[str, ...] = ()
    position_BT: Tensor | None = None

    def target_positions(self) -> tuple[Tensor, Tensor]:
        """Return rows and columns, int64 `[N]`, of the response tokens that follow one of their document.

        These are the targets of head 1, row by row. On an accelerator use this method instead of a mask: for
        batches made by core it does not wait for the device.
        """
        follows_BT = self.document_BT[:, 1:] == self.document_BT[:, :-1]
        row_N, column_N = (self.response_BT[:, 1:] & follows_BT).nonzero(as_tuple=True)
        return row_N, column_N + 1


@frozen(kw_only=True, eq=False)
class StepView:
    """What a weighting sees: the whole global batch of one step. A signal it did not declare is None.

    Attributes:
        ids_BT: int64 token ids.
        document_BT: int64 document number within the row; -1 on padding.
        response_BT: bool, True on the tokens that are targets.
        target_BTK: bool, True where the pair (source t, head k) counts, i.e. `x[t + k]` is a response
            token of the document of `x[t]`.
        n_future: K.
        step: Optimiser steps done in this stage.
        training: False during validation; moving statistics must then stay as they are.
        reward_BT: float32, `Signal.REWARD`: see `Batch.reward_BT`.
        group_BT: int64, `Signal.GROUP`: see `Batch.group_BT`.
        value_BT: float32, `Signal.VALUE`: V_t, the critic's value of the prefix that ends at token t.
        token_loss_BTK: float32, `Signal.TOKEN_LOSS`: the policy's current cross-entropy, 0 off `target_BTK`.
        token_entropy_BTK: float32, `Signal.TOKEN_ENTROPY`: the entropy, in nats, of what the policy's head
            expects there, whatever the target is; 0 off `target_BTK`.
        reference_loss_BT: float32, `Signal.REFERENCE_LOSS`: a reference model's next-token cross-entropy
            of token t, 0 off `response_BT`.
    """

    ids_BT: Tensor
    document_BT: Tensor
    response_BT: Tensor
    target_BTK: Tensor
    n_future: int
    step: int
    training: bool
    reward_BT: Tensor | None = None
    group_BT: Tensor | None = None
    value_BT: Tensor | None = None
    token_loss_BTK: Tensor | None = None
    token_entropy_BTK: Tensor | None = None
    reference_loss_BT: Tensor | None = None

    def to_pairs(self, x_BT: Tensor) -> Tensor:
        """Lay what belongs to target tokens onto the pairs that predict them: `[B, T, K]`, 0 elsewhere."""
        from weighted_mtp_core.api.alignment import align_weights

        return align_weights(x_BT, self.target_BTK)

    def to_targets(self, x_BTK: Tensor) -> Tensor:
        """Lay what belongs to pairs onto their targets: entry (t, k) of the result is of head k for token t.

        It is 0 where head k has no source for token t, which lies too near the start of its document.
        """
        from weighted_mtp_core.api.alignment import gather_by_target

        return gather_by_target(x_BTK, self.target_BTK)


@frozen(kw_only=True, eq=False)
class Weights:
    """Weights of target tokens.

    Attributes:
        weight: float32, detached, finite, >= 0. `[B, T]` (indexed by the target token, 0 off
            `response_BT`) or `[B, T, K]` (indexed by source and head, 0 off `target_BTK`).
        metrics: Scalars to log, as 0-dim tensors or floats; read after the step, so that nothing waits.
    """

    weight: Tensor
    metrics: Mapping[str, Tensor | float] = field(factory=dict)


@frozen(kw_only=True, eq=False)
class Scores:
    """What a critic says of each token; it fills exactly the fields whose signals it `provides`."""

    value_BT: Tensor | None = None
    reference_loss_BT: Tensor | None = None


@frozen(kw_only=True, eq=False)
class CriticLoss:
    """A critic's scalar training loss (fp32, with gradient) and scalars to log."""

    loss: Tensor
    metrics: Mapping[str, Tensor | float] = field(factory=dict)
