"""Weights `w_t = clip(V_t / V_{t-1}, 0, cap)^power`, where V_t is the probability of success after token t.

Let p be the policy that wrote the data, and V(s) the probability of success after a prefix s. By Bayes' rule,
a policy that imitates only the successful responses of p predicts token x after s with the probability

    p(x | s, success) = p(x | s) V(s, x) / V(s).

So if token t has the weight V_t / V_{t-1}, the policy p(x | s, success) has the smallest weighted
cross-entropy, whatever the mix of right and wrong responses in the data. A loss over only the right responses
has the same minimum. However, that loss weighs each token by the outcome of the whole response, which varies
more than the ratio.

Shape letters: B batch rows, T positions, K heads, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from weighted_mtp_core.api import ModelContext, StepView, WeightingStrategy, Weights, is_correct

from weighted_mtp_verifiable._reductions import masked_mean, same_as_previous

if TYPE_CHECKING:
    from weighted_mtp_verifiable import SuccessRatioOptions


class SuccessRatio(WeightingStrategy):
    """Computes weights of tokens, or of pairs (source token, head), from the logarithms of critic values.

    Args:
        options: The options of the component.
        model: Context whose tokenizer shows where lines end, for `span = "line"`.
    """

    def __init__(self, options: SuccessRatioOptions, model: ModelContext) -> None:
        self._options = options
        self._has_break_V = _has_line_break(model) if options.span == "line" else None

    def weigh(self, view: StepView) -> Weights:
        """Return weights, float32: `[B, T]` for `heads = "target"`, `[B, T, K]` for `heads = "path"`."""
        assert view.log_value_BT is not None
        assert view.reward_BT is not None
        options, log_value_BT = self._options, view.log_value_BT
        first_BT, last_BT = self._span_bounds(view)
        # The first token of a document has no prefix, so the value before it is unknown. Here -inf stands for
        # this value, so that the ratio is 1.
        previous_BT = F.pad(log_value_BT[:, :-1], (1, 0)).where(
            same_as_previous(view.document_BT), -torch.inf
        )
        before, after = previous_BT.gather(1, first_BT), log_value_BT.gather(1, last_BT)
        reward, mask = view.reward_BT, view.response_BT
        if options.heads == "path":
            before = before.gather(1, _next_response_token(view.response_BT))[..., None]
            after, reward, mask = view.to_pairs(after), view.to_pairs(reward), view.target_BTK
        # The ratio is 1 if the value before the token is 0: success is then impossible, whatever the token.
        ratio = (after - before).exp().where(before != -torch.inf, 1.0)
        weight = ratio.clamp(0.0, options.cap).pow(options.power)
        if options.where == "wrong":
            weight = weight.where(~is_correct(reward), 1.0)
        return Weights(
            weight=weight.where(mask, 0.0),
            metrics={
                "success_ratio_mean": masked_mean(ratio.clamp(0.0, options.cap), mask),
                "capped_fraction": masked_mean((ratio > options.cap).float(), mask),
            },
        )

    def _span_bounds(self, view: StepView) -> tuple[Tensor, Tensor]:
        """Return the indices of the first and the last token of each response token's span, int64 `[B, T]`.

        With `span = "token"`, the span of a token is the token itself. With `span = "line"`, it is the line
        of the token. A token that contains a line break ends its line. A line also ends where a sequence of
        response tokens ends.
        """
        index_BT = torch.arange(view.ids_BT.shape[1], device=view.ids_BT.device).expand_as(view.ids_BT)
        if self._has_break_V is None:
            return index_BT, index_BT
        response_BT, break_BT = view.response_BT, self._has_break_V[view.ids_BT]
        joined_BT = response_BT & same_as_previous(view.document_BT)  # with the previous token
        joined_BT[:, 1:] &= response_BT[:, :-1] & ~break_BT[:, :-1]
        first_BT = index_BT.where(~joined_BT, 0).cummax(dim=1).values
        is_last_BT = ~F.pad(joined_BT[:, 1:], (0, 1))
        return first_BT, _next_marked(index_BT, is_last_BT)


def _next_response_token(response_BT: Tensor) -> Tensor:
    """Return for each token the index of the next response token; the row's last index if there is none."""
    index_BT = torch.arange(response_BT.shape[1], device=response_BT.device).expand_as(response_BT)
    last = response_BT.shape[1] - 1
    return F.pad(_next_marked(index_BT, response_BT)[:, 1:], (0, 1), value=last)


def _next_marked(index_BT: Tensor, marked_BT: Tensor) -> Tensor:
    """Return for each token the first marked index at or after it; the row's last index if there is none."""
    last = index_BT.shape[1] - 1
    return index_BT.where(marked_BT, last).flip(1).cummin(dim=1).values.flip(1)


def _has_line_break(model: ModelContext) -> Tensor:
    """Return for each token id whether its text contains a line break, bool `[V]`."""
    breaks = ["\n" in model.decode([token]) for token in range(model.vocab_size)]
    return torch.tensor(breaks, device=model.device)
