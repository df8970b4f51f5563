"""Define what core and plugins exchange: batches, the inputs of weightings, weights, scores and losses.

Shape letters: B batch rows, T positions, K heads (`n_future`), H hidden, V vocabulary.

Index convention, where x are the token ids `[B, T]`: entry (b, t) of a `[B, T]` tensor belongs to the token
`x[b, t]` itself. Entry (b, t, k - 1) of a `[B, T, K]` tensor belongs to the pair (source t, head k), that is,
to the prediction of `x[b, t + k]` by head k. Only core shifts tensors along T.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import field, frozen

if TYPE_CHECKING:
    from torch import Tensor


class Signal(enum.Enum):
    """A quantity known for each token, or for each pair (source t, head k), of a batch.

    A weighting gets the signals that its component `needs`. `VALUE`, `LOG_VALUE` and `REFERENCE_LOSS` are
    signals that a critic `provides`; `REWARD` and `GIVEN` come from the data. Core computes all other
    signals, and also `LOG_VALUE` if the critic provides only `VALUE`. `StepView` describes the tensor of each
    signal.
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
"""Signals that estimate the reward of a response; core measures a critic that provides at least one."""

CRITIC_SIGNALS = (*VALUES, Signal.REFERENCE_LOSS)
"""All signals that a critic can provide."""


@frozen(kw_only=True, eq=False)
class Batch:
    """Rows of tokens with the labels of each token. All tensors are on the same device.

    Attributes:
        ids_BT: int64 token ids; padding is on the right.
        document_BT: int64 index of the document within its row, from 0; -1 on padding.
        response_BT: bool, True on the target tokens, that is, on response tokens including EOS.
        reward_BT: float32 reward of the response, on each token of the response; 0 on prompts and padding.
        group_BT: int64 number of the problem: two tokens of a batch have equal numbers if and only if they
            belong to the same problem; -1 on padding.
        example_ids: For each row, the ids of its examples, joined with a plus sign, for use in messages.
        position_BT: int64 index of each token within its document, 0 on padding. None means that each row
            contains one document, with positions 0, 1, ...
        given_BT: float32 weight that the data give each response token; 0 on prompts and padding. A weight is
            negative only if the recipe allows negative weights or the weighting does not need `Signal.GIVEN`.
            None if the data have no weights.
        problem_BT: int64 hash of the problem's id, which is the same in every batch, split and run; 0 on
            padding. None if the ids are unknown, for example in a test.
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
        """Return the row indices and column indices, each int64 `[N]`, of the N targets of head 1.

        The targets of head 1 are the response tokens that follow another token of their document. The targets
        are ordered by row. On an accelerator, prefer this method to a boolean mask: for batches created by
        core, the method does not synchronise with the device.
        """
        follows_BT = self.document_BT[:, 1:] == self.document_BT[:, :-1]
        row_N, column_N = (self.response_BT[:, 1:] & follows_BT).nonzero(as_tuple=True)
        return row_N, column_N + 1


@frozen(kw_only=True, eq=False)
class StepView:
    """The global batch of one step, as a weighting receives it; signals that are not needed are None.

    Attributes:
        ids_BT: int64 token ids.
        document_BT: int64 index of the document within its row, from 0; -1 on padding.
        response_BT: bool, True on target tokens.
        target_BTK: bool, True where the pair (source t, head k) counts: `x[t + k]` is a response token of the
            document of `x[t]`.
        n_future: K, the number of heads.
        step: Optimiser steps completed in this stage.
        training: False if the batch is only measured, for example for the report of the run; a weighting must
            then not update moving statistics.
        steps: Number of optimiser steps of this stage, for schedules.
        example_ids: `example_ids[b][n]` is the id of the example whose document has the index n in row b, as
            in `document_BT`.
        metadata: `metadata[b][n]` is the `Example.metadata` of the example `example_ids[b][n]`.
        reward_BT: float32, `Signal.REWARD`: reward of the response, on each token of the response; 0 on
            prompts and padding.
        group_BT: int64, `Signal.GROUP`: two tokens have equal numbers if and only if they belong to the same
            problem; -1 on padding.
        given_BT: float32, `Signal.GIVEN`: the weight that the data give the token, 1 if the data give none; 0
            where `response_BT` is False.
        value_BT: float32, `Signal.VALUE`: V_t, the critic's value of the prefix that ends at token t.
        log_value_BT: float32, `Signal.LOG_VALUE`: log V_t, where V_t is the critic's value of the prefix that
            ends at token t; -inf if V_t is 0. A critic that cannot determine the value V_0 of the prompt
            gives log(V_t / V_0) instead, so only differences within a document have a meaning. A critic that
            determines V_0 should also provide `Signal.VALUE`; otherwise, core measures the critic with the
            mean reward of the training responses in place of V_0.
        token_loss_BTK: float32, `Signal.TOKEN_LOSS`: the policy's current cross-entropy of the pair, in nats;
            0 where `target_BTK` is False.
        token_entropy_BTK: float32, `Signal.TOKEN_ENTROPY`: entropy, in nats, of the distribution that the
            head predicts for the pair, whatever the target is; 0 where `target_BTK` is False.
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
        """Return `[B, T, K]`: for each pair, the entry of `x_BT` at the pair's target token.

        Entries of pairs that do not count are 0.
        """
        return align_weights(x_BT, self.target_BTK)

    def to_targets(self, x_BTK: Tensor) -> Tensor:
        """Return the entries of `x_BTK`, `[B, T, K]`, indexed by target and head instead of source and head.

        In the result, the entry of token t and head k belongs to the pair with head k and target t. An entry
        is 0 if this pair does not count or does not exist, for example because t is a prompt token or is too
        near the start of its document.
        """
        return gather_by_target(x_BTK, self.target_BTK)


@frozen(kw_only=True, eq=False)
class Weights:
    """The weights that a weighting returns for one step.

    Attributes:
        weight: float32, finite, without gradient; >= 0 unless the component declares `negative_weights` and
            the recipe allows negative weights. The shape is either `[B, T]`, indexed by target token, with 0
            where `response_BT` is False, or `[B, T, K]`, indexed by source and head, with 0 where
            `target_BTK` is False.
        metrics: Scalars to log, as floats or 0-dim tensors. The names of these metrics must differ from the
            names of core's metrics. Tensors are read after the step, so they may stay on the device.
    """

    weight: Tensor
    metrics: Mapping[str, Tensor | float] = field(factory=dict)


@frozen(kw_only=True, eq=False)
class Scores:
    """A critic's scores of every token, float32 `[B, T]`; `StepView` describes fields of the same names.

    A field is None unless the critic's component `provides` the signal of the field. A critic that provides
    `Signal.VALUE` need not provide `Signal.LOG_VALUE`.
    """

    value_BT: Tensor | None = None
    reference_loss_BT: Tensor | None = None
    log_value_BT: Tensor | None = None


@frozen(kw_only=True, eq=False)
class CriticLoss:
    """A critic's training loss of one batch.

    Core computes the loss of a step in parts, one per micro-batch and process, and averages loss and metrics
    over the parts, weighted by rows. The results do not depend on the parts if loss and metrics are means
    over rows; means over tokens would depend on the parts.

    Attributes:
        loss: float32 scalar, with gradient.
        metrics: Scalars to log, as floats or 0-dim tensors without gradient. The names of these metrics must
            differ from the names of core's metrics.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor | float] = field(factory=dict)


def align_weights(weight: Tensor, target_BTK: Tensor) -> Tensor:
    """Return weights `[B, T, K]`, indexed by source and head, with 0 for pairs that do not count.

    Args:
        weight: Weights `[B, T]`, indexed by target token, or `[B, T, K]`, indexed by source and head.
        target_BTK: bool, True for the pairs that count.
    """
    if weight.ndim == 3:
        return weight.where(target_BTK, 0.0)
    weight_BTK = weight.new_zeros(target_BTK.shape)
    for k in range(1, min(target_BTK.shape[2], weight.shape[1] - 1) + 1):
        weight_BTK[:, :-k, k - 1] = weight[:, k:]
    return weight_BTK.where(target_BTK, 0.0)


def gather_by_target(x_BTK: Tensor, target_BTK: Tensor) -> Tensor:
    """Return the entries of `x_BTK`, `[B, T, K]`, indexed by target and head; 0 if a pair does not count.

    Args:
        x_BTK: One number per pair, indexed by source and head.
        target_BTK: bool, True for the pairs that count.
    """
    counted_BTK = x_BTK.where(target_BTK, 0.0)
    by_target_BTK = counted_BTK.new_zeros(counted_BTK.shape)
    for k in range(1, min(target_BTK.shape[2], x_BTK.shape[1] - 1) + 1):
        by_target_BTK[:, k:, k - 1] = counted_BTK[:, :-k, k - 1]
    return by_target_BTK
