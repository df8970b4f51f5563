"""Tensors that core and plugins exchange: batches, what a weighting sees of them, weights, scores, losses.

Shape letters: B batch rows, T positions, K heads (`n_future`), H hidden, V vocabulary.

Index convention: entry (b, t) of a `[B, T]` tensor belongs to the token `x[b, t]` itself. Entry (b, t, k - 1)
of a `[B, T, K]` tensor belongs to the pair of source t and head k, which predicts `x[b, t + k]`. Only core
shifts tensors along T.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import field, frozen

if TYPE_CHECKING:
    from torch import Tensor


class Signal(enum.Enum):
    """A quantity known for each token of a batch. A weighting receives those that its component `needs`.

    A critic `provides` the signals `VALUE`, `LOG_VALUE` and `REFERENCE_LOSS`, and `GIVEN` is part of the
    data; core computes all other signals, and `LOG_VALUE` from `VALUE`. `StepView` describes the tensor of
    each signal.
    """

    REWARD = "reward"
    GIVEN = "given"
    VALUE = "value"
    LOG_VALUE = "log_value"
    GROUP = "group"
    TOKEN_LOSS = "token_loss"  # noqa: S105 - the name of a signal, not a secret
    TOKEN_ENTROPY = "token_entropy"  # noqa: S105
    REFERENCE_LOSS = "reference_loss"


VALUES = (Signal.VALUE, Signal.LOG_VALUE)
"""Signals that tell how likely a response is to be correct; a critic that provides one of them is judged."""

CRITIC_SIGNALS = (*VALUES, Signal.REFERENCE_LOSS)
"""Signals that come from a critic."""


@frozen(kw_only=True, eq=False)
class Batch:
    """Rows of tokens with the labels of each token. All tensors are on the same device.

    Attributes:
        ids_BT: int64 token ids; padding is on the right.
        document_BT: int64 index of the document within its row, from 0; -1 on padding.
        response_BT: bool, True on response tokens, EOS included. These are the target tokens.
        reward_BT: float32 reward of the response, on each of its tokens; 0 on prompts and padding.
        group_BT: int64 number of the problem: tokens of this batch have equal numbers if and only if they
            belong to the same problem; -1 on padding.
        example_ids: Ids of the examples of the batch, row by row, for use in messages.
        position_BT: int64 index of each token within its document, 0 on padding. None if each row holds one
            document, with positions 0, 1, ...
        given_BT: float32 weight that the data give each response token, negative only if the recipe allows
            negative weights; 0 on prompts and padding. None if the data have no weights.
        problem_BT: int64 hash of the problem's id, which is the same in every batch, split and run; 0 on
            padding. None if the batch was not made by core.
    """

    ids_BT: Tensor
    document_BT: Tensor
    response_BT: Tensor
    reward_BT: Tensor
    group_BT: Tensor
    example_ids: tuple[str, ...] = ()
    position_BT: Tensor | None = None
    given_BT: Tensor | None = None
    problem_BT: Tensor | None = None

    def target_positions(self) -> tuple[Tensor, Tensor]:
        """Return the row and column indices, int64 `[N]` each, of the N targets of head 1, ordered by row.

        The targets of head 1 are the response tokens that follow another token of their document. On an
        accelerator, prefer this method to a boolean mask: for batches made by core it does not synchronise
        with the device.
        """
        follows_BT = self.document_BT[:, 1:] == self.document_BT[:, :-1]
        row_N, column_N = (self.response_BT[:, 1:] & follows_BT).nonzero(as_tuple=True)
        return row_N, column_N + 1


@frozen(kw_only=True, eq=False)
class StepView:
    """The global batch of one step, as a weighting receives it. Signals that it does not need are None.

    Attributes:
        ids_BT: int64 token ids.
        document_BT: int64 index of the document within its row, from 0; -1 on padding.
        response_BT: bool, True on target tokens.
        target_BTK: bool, True where the pair (source t, head k) counts: `x[t + k]` is a response token of the
            document of `x[t]`.
        n_future: K, the number of heads.
        step: Optimiser steps completed in this stage.
        training: False during validation, when moving statistics must not be updated.
        steps: Number of optimiser steps of this stage, for schedules.
        example_ids: `example_ids[b][n]` is the id of the example of document n (see `document_BT`) in row b.
        metadata: `metadata[b][n]` is the `Example.metadata` of that example.
        reward_BT: float32, `Signal.REWARD`: see `Batch.reward_BT`.
        group_BT: int64, `Signal.GROUP`: see `Batch.group_BT`.
        given_BT: float32, `Signal.GIVEN`: the weight that the data give the token, 1 if the data give none; 0
            where `response_BT` is False.
        value_BT: float32, `Signal.VALUE`: V_t, the critic's value of the prefix that ends at token t.
        log_value_BT: float32, `Signal.LOG_VALUE`: log V_t, or log(V_t / V_0) if the critic does not know V_0,
            the value of the document's prompt. So only differences within a document have a meaning. -inf
            if V_t is 0.
        token_loss_BTK: float32, `Signal.TOKEN_LOSS`: the policy's current cross-entropy of the pair, in nats;
            0 where `target_BTK` is False.
        token_entropy_BTK: float32, `Signal.TOKEN_ENTROPY`: entropy of the distribution that the head predicts
            for the pair, in nats, which does not depend on the target; 0 where `target_BTK` is False.
        reference_loss_BT: float32, `Signal.REFERENCE_LOSS`: a reference model's next-token cross-entropy of
            token t, in nats; 0 where `response_BT` is False.
    """

    ids_BT: Tensor
    document_BT: Tensor
    response_BT: Tensor
    target_BTK: Tensor
    n_future: int
    step: int
    training: bool
    steps: int = 1
    example_ids: tuple[tuple[str, ...], ...] = ()
    metadata: tuple[tuple[Mapping[str, str | float], ...], ...] = ()
    reward_BT: Tensor | None = None
    group_BT: Tensor | None = None
    given_BT: Tensor | None = None
    value_BT: Tensor | None = None
    log_value_BT: Tensor | None = None
    token_loss_BTK: Tensor | None = None
    token_entropy_BTK: Tensor | None = None
    reference_loss_BT: Tensor | None = None

    def to_pairs(self, x_BT: Tensor) -> Tensor:
        """Return `[B, T, K]`: for each pair, the number of its target token; 0 if the pair does not count."""
        return align_weights(x_BT, self.target_BTK)

    def to_targets(self, x_BTK: Tensor) -> Tensor:
        """Index the numbers of pairs, `[B, T, K]`, by target token and head instead of source and head.

        Entry (t, k) is the number of head k for target token t, or 0 if head k does not predict that token,
        for example because the token is too near the start of its document.
        """
        return gather_by_target(x_BTK, self.target_BTK)


@frozen(kw_only=True, eq=False)
class Weights:
    """The weights that a weighting returns for one step.

    Attributes:
        weight: float32, finite, without gradient; >= 0 unless the component declares `negative_weights` and
            the recipe allows them. Either `[B, T]`, indexed by target token, 0 where
            `response_BT` is False; or `[B, T, K]`, indexed by source and head, 0 where `target_BTK` is False.
        metrics: Scalars to log, as floats or 0-dim tensors, with names that core's metrics do not have.
            Tensors are read after the step, so they may stay on the device.
    """

    weight: Tensor
    metrics: Mapping[str, Tensor | float] = field(factory=dict)


@frozen(kw_only=True, eq=False)
class Scores:
    """A critic's scores of every token, float32 `[B, T]`. `StepView` describes fields of the same names.

    A field is None unless the component `provides` its signal. A critic that provides `Signal.VALUE` need not
    provide `Signal.LOG_VALUE`.
    """

    value_BT: Tensor | None = None
    reference_loss_BT: Tensor | None = None
    log_value_BT: Tensor | None = None


@frozen(kw_only=True, eq=False)
class CriticLoss:
    """A critic's training loss of one batch.

    Attributes:
        loss: float32 scalar, with gradient.
        metrics: Scalars to log, as floats or 0-dim tensors without gradient, with names that core's metrics
            do not have.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor | float] = field(factory=dict)


def align_weights(weight: Tensor, target_BTK: Tensor) -> Tensor:
    """Return weights `[B, T, K]`, indexed by source and head, 0 for pairs that do not count.

    Args:
        weight: `[B, T]`, indexed by target token, or `[B, T, K]`, already indexed by source and head.
        target_BTK: bool, True for the pairs that count.
    """
    if weight.ndim == 3:
        return weight.where(target_BTK, 0.0)
    weight_BTK = weight.new_zeros(target_BTK.shape)
    for k in range(1, min(target_BTK.shape[2], weight.shape[1] - 1) + 1):
        weight_BTK[:, :-k, k - 1] = weight[:, k:]
    return weight_BTK.where(target_BTK, 0.0)


def gather_by_target(x_BTK: Tensor, target_BTK: Tensor) -> Tensor:
    """Return the numbers of pairs, `[B, T, K]`, indexed by target and head, 0 for pairs that do not count.

    Args:
        x_BTK: Numbers indexed by source and head.
        target_BTK: bool, True for the pairs that count.
    """
    counted_BTK = x_BTK.where(target_BTK, 0.0)
    by_target_BTK = counted_BTK.new_zeros(counted_BTK.shape)
    for k in range(1, min(target_BTK.shape[2], x_BTK.shape[1] - 1) + 1):
        by_target_BTK[:, k:, k - 1] = counted_BTK[:, :-k, k - 1]
    return by_target_BTK
