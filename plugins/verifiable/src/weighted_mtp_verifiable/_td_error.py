"""Weights `w = clip(exp(A / beta))`, where A is the advantage of the token.

This is advantage-weighted regression (Peng et al. 2019, https://arxiv.org/abs/1910.00177, eq. 10), applied to
the tokens of multi-token prediction (Gloeckle et al. 2024, https://arxiv.org/abs/2404.19737). Tokens that
lead to a better result than the critic expected are imitated more than tokens that lead to a worse result.

Shape letters: B batch rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights, is_correct

from weighted_mtp_verifiable._advantage import advantages, td_errors
from weighted_mtp_verifiable._reductions import document_sums
from weighted_mtp_verifiable._whitening import MovingStatistics, whiten

if TYPE_CHECKING:
    from weighted_mtp_verifiable import TdErrorOptions


class TdError(WeightingStrategy):
    """Computes weights of response tokens from values and rewards.

    Args:
        options: The options of the component.
        device: Device of the moving statistics.
    """

    def __init__(self, options: TdErrorOptions, *, device: torch.device) -> None:
        self._options = options
        self._moving = MovingStatistics(options.ema_decay, device=device)

    def weigh(self, view: StepView) -> Weights:
        """Return weights, float32 `[B, T]`; 0 for tokens outside responses."""
        assert view.value_BT is not None
        assert view.reward_BT is not None
        options = self._options
        response_BT, document_BT = view.response_BT, view.document_BT
        delta_BT = td_errors(
            view.value_BT.float(),
            view.reward_BT.float(),
            document_BT=document_BT,
            response_BT=response_BT,
            gamma=options.gamma,
        )
        advantage_BT = delta_BT
        if options.estimator == "gae":
            advantage_BT = advantages(delta_BT, document_BT=document_BT, gamma=options.gamma, lam=options.lam)
        responses = _ResponseMean.over(response_BT)
        mean, std = responses.mean_and_std(advantage_BT)
        if options.whiten == "ema" and view.training:
            self._moving.update(mean, std, where=response_BT.any())
        whitened_BT = self._whiten(advantage_BT, mean, std)
        if options.sign == "reward":
            whitened_BT = _signed_by_reward(whitened_BT, view.reward_BT)
        low, high = options.clip
        raw_BT = torch.exp(whitened_BT / options.beta)
        learnt_BT = response_BT & is_correct(view.reward_BT) if options.positives_only else response_BT
        weight_BT = raw_BT.clamp(low, high).where(learnt_BT, 0.0)
        if options.per_response:
            weight_BT = _scaled_per_response(weight_BT, response_BT, document_BT)
        return Weights(
            weight=weight_BT,
            metrics={
                "td_error_mean": responses.mean(delta_BT),
                "td_error_abs_mean": responses.mean(delta_BT.abs()),
                "advantage_mean": mean,
                "advantage_std": std,
                "value_mean": responses.mean(view.value_BT.float()),
                "clipped_fraction": responses.mean(((raw_BT < low) | (raw_BT > high)).float()),
            },
        )

    def _whiten(self, advantage_BT: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        if self._options.whiten == "none":
            return advantage_BT
        if self._options.whiten == "ema":
            mean, std = self._moving.mean_and_std()
        return whiten(advantage_BT, mean, std)

    def state_dict(self) -> dict[str, Any]:
        """Return the moving statistics; empty unless `whiten = "ema"`."""
        return self._moving.state_dict() if self._options.whiten == "ema" else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the moving statistics.

        Raises:
            WmtpError: The state does not fit the option `whiten`.
        """
        if self._options.whiten == "ema":
            self._moving.load_state_dict(state)
        else:
            super().load_state_dict(state)


def _signed_by_reward(advantage_BT: Tensor, reward_BT: Tensor) -> Tensor:
    """Return max(A, 0) in correct and min(A, 0) in incorrect responses, where A is the advantage."""
    return torch.where(is_correct(reward_BT), advantage_BT.clamp(min=0), advantage_BT.clamp(max=0))


def _scaled_per_response(weight_BT: Tensor, response_BT: Tensor, document_BT: Tensor) -> Tensor:
    """Scale the weights of each response to mean 1; if all weights of a response are 0, they stay 0."""
    total_BT = document_sums(weight_BT, document_BT)
    count_BT = document_sums(response_BT.float(), document_BT)
    return weight_BT / total_BT.clamp(min=torch.finfo(torch.float32).tiny) * count_BT


@frozen(eq=False)
class _ResponseMean:
    """Computes means over the response tokens of a batch.

    Attributes:
        mask_BT: 1.0 for response tokens, 0.0 for other tokens.
        count: Number of response tokens, at least 1.
    """

    mask_BT: Tensor
    count: Tensor

    @classmethod
    def over(cls, response_BT: Tensor) -> _ResponseMean:
        mask_BT = response_BT.float()
        return cls(mask_BT, mask_BT.sum().clamp(min=1))

    def mean(self, x_BT: Tensor) -> Tensor:
        """Return the mean of x, whose entries must be finite; 0 if there are no response tokens."""
        return (x_BT * self.mask_BT).sum() / self.count

    def mean_and_std(self, x_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the population standard deviation of x."""
        mean = self.mean(x_BT)
        return mean, self.mean((x_BT - mean).square()).sqrt()
