"""Weights from advantages: `w = clip(exp(A / beta))`.

That is advantage-weighted regression (Peng et al. 2019, https://arxiv.org/abs/1910.00177, eq. 10) on the
tokens of multi-token prediction (Gloeckle et al. 2024, https://arxiv.org/abs/2404.19737): imitate what did
better than the critic expected more than what did worse.

Shape letters: B batch rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights, WmtpError

from weighted_mtp_verifiable._advantage import advantages, document_sums, td_errors
from weighted_mtp_verifiable._objective import CORRECT

if TYPE_CHECKING:
    from weighted_mtp_verifiable import TdErrorOptions

_SMALLEST_STD = 1e-6  # below this all advantages are the same but for rounding: they are left unscaled


class TdError(WeightingStrategy):
    """Turns values and rewards into weights of response tokens.

    Args:
        options: See `TdErrorOptions`.
        device: Where moving statistics live.
    """

    def __init__(self, options: TdErrorOptions, *, device: torch.device) -> None:
        self._options = options
        # Sums of decayed shares, means and mean squares: their ratios are free of the bias of the zero start
        # (as in Adam, Kingma and Ba 2015, section 3).
        self._moments = torch.zeros(3, device=device)

    def weigh(self, view: StepView) -> Weights:
        """Return `[B, T]` weights; see `advantages` for what A is."""
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
        responses = _Responses.of(response_BT)
        mean, std = responses.moments(advantage_BT)
        shift, scale = self._whitening(mean, std, any_response=response_BT.any(), training=view.training)
        low, high = options.clip
        whitened_BT = (advantage_BT - shift) / scale
        if options.sign == "reward":
            whitened_BT = _signed_by_reward(whitened_BT, view.reward_BT)
        raw_BT = torch.exp(whitened_BT / options.beta)
        learnt_BT = response_BT & (view.reward_BT > 0) if options.positives_only else response_BT
        weight_BT = raw_BT.clamp(low, high).where(learnt_BT, 0.0)
        if options.per_response:
            weight_BT = _per_response(weight_BT, response_BT, document_BT)
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

    def _whitening(
        self, mean: Tensor, std: Tensor, *, any_response: Tensor, training: bool
    ) -> tuple[Tensor, Tensor]:
        """Return what advantages are whitened with, given the batch's mean and standard deviation."""
        if self._options.whiten == "none":
            return torch.zeros_like(mean), torch.ones_like(std)
        if self._options.whiten == "ema":
            if training:
                kept = self._options.ema_decay
                now = torch.stack([torch.ones_like(mean), mean, std.square() + mean.square()])
                moved = kept * self._moments + (1 - kept) * now
                self._moments = torch.where(any_response, moved, self._moments)
            share, mean_sum, square_sum = self._moments.unbind()
            share = share.clamp(min=torch.finfo(torch.float32).tiny)
            mean = mean_sum / share
            std = (square_sum / share - mean.square()).clamp(min=0).sqrt()
        return mean, std.where(std > _SMALLEST_STD, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the moving statistics, if there are any."""
        return {"moments": self._moments.clone()} if self._options.whiten == "ema" else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        if self._options.whiten != "ema":
            super().load_state_dict(state)
            return
        if set(state) != {"moments"}:
            raise WmtpError(f"state of `td_error` must hold `moments`, got {sorted(state)}")
        self._moments = state["moments"].to(self._moments.device, copy=True)


def _signed_by_reward(advantage_BT: Tensor, reward_BT: Tensor) -> Tensor:
    """Return what agrees with the outcome: max(A, 0) in right responses, min(A, 0) in wrong ones."""
    return torch.where(reward_BT >= CORRECT, advantage_BT.clamp(min=0), advantage_BT.clamp(max=0))


def _per_response(weight_BT: Tensor, response_BT: Tensor, document_BT: Tensor) -> Tensor:
    """Return weights whose mean over each response is 1; those of a response without any stay 0."""
    total_BT = document_sums(weight_BT, document_BT)
    count_BT = document_sums(response_BT.float(), document_BT)
    return weight_BT / total_BT.clamp(min=torch.finfo(torch.float32).tiny) * count_BT


@frozen(eq=False)
class _Responses:
    """The response tokens of a batch, 1 where there is one, and their number, at least 1; float32."""

    is_one_BT: Tensor
    count: Tensor

    @classmethod
    def of(cls, mask_BT: Tensor) -> _Responses:
        is_one_BT = mask_BT.float()
        return cls(is_one_BT, is_one_BT.sum().clamp(min=1))

    def mean(self, x_BT: Tensor) -> Tensor:
        """Return the mean over response tokens, of what is finite; 0 where there are none."""
        return (x_BT * self.is_one_BT).sum() / self.count

    def moments(self, x_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and (population) standard deviation over response tokens."""
        mean = self.mean(x_BT)
        return mean, self.mean((x_BT - mean).square()).sqrt()
