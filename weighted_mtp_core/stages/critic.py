"""Stage 1: training of the critic, and the proof that it beats a constant.

Shape letters: B rows, T positions, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import define, field, frozen
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from weighted_mtp_core.api import Batch, Critic
from weighted_mtp_core.data.batches import split_rows
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.stages.loop import Learner, Validation
from weighted_mtp_core.stages.world import ALONE, World, laid_out

Floats = NDArray[np.float64]
_RESAMPLES = 1000
_BINS = 10
_Z = 1.96  # of a 95 % interval
_PROBABILITY_FLOOR = 1e-6  # keeps the logarithm of a saturated value finite


@frozen(kw_only=True)
class ReliabilityBin:
    """Responses whose final values are alike, and how they turned out.

    Attributes:
        count: How many responses.
        value: Their mean value.
        reward: Their mean reward; that of a calibrated critic is `value`.
        low: Lower end of the 95 % interval of `reward` (Wilson 1927), responses taken as independent.
        high: Upper end.
    """

    count: int
    value: float
    reward: float
    low: float
    high: float


@frozen(kw_only=True)
class CriticReport:
    """How well final values tell right responses from wrong ones, beside the best constant.

    Attributes:
        auc: Area under the ROC curve of the value after the last response token; a constant has 0.5.
        auc_low: Lower end of its 95 % interval (bootstrap over problems).
        auc_high: Upper end.
        value_bce: Mean binary cross-entropy of the final values, in nats.
        constant_bce: The same for the constant that knows this split's mean reward.
        value_margin: Mean value of correct minus mean value of incorrect responses.
        reliability: Ten bins of equal width from 0 to 1, without those that hold no response.
    """

    auc: float
    auc_low: float
    auc_high: float
    value_bce: float
    constant_bce: float
    value_margin: float
    reliability: tuple[ReliabilityBin, ...]

    @property
    def informative(self) -> bool:
        """Whether the interval of the AUC lies above chance."""
        return self.auc_low > 0.5

    def metrics(self) -> dict[str, float]:
        """Return the report as metrics."""
        return {
            "critic_auc": self.auc,
            "critic_auc_low": self.auc_low,
            "critic_auc_high": self.auc_high,
            "critic_value_bce": self.value_bce,
            "critic_constant_bce": self.constant_bce,
            "critic_value_margin": self.value_margin,
        }


def report_critic(value_D: Floats, reward_D: Floats, problem_D: NDArray[np.int64]) -> CriticReport:
    """Compare final values with rewards.

    Responses to one problem are not independent, so the interval resamples problems, not responses.

    Raises:
        RunFailedError: The responses are all right or all wrong, so nothing can be told.
    """
    correct_D = reward_D >= 0.5
    if correct_D.all() or not correct_D.any():
        raise RunFailedError(
            f"all {len(reward_D)} validation responses are {'correct' if correct_D.any() else 'incorrect'}: "
            "a critic cannot be validated on them",
            hint="choose data with right and wrong responses in the split `validation`",
        )
    low, high = _auc_interval(value_D, correct_D, problem_D)
    return CriticReport(
        auc=float(roc_auc_score(correct_D, value_D)),
        auc_low=low,
        auc_high=high,
        value_bce=_bce(value_D, reward_D),
        constant_bce=_bce(np.full_like(value_D, reward_D.mean()), reward_D),
        value_margin=float(value_D[correct_D].mean() - value_D[~correct_D].mean()),
        reliability=tuple(_reliability(value_D, reward_D)),
    )


def _reliability(value_D: Floats, reward_D: Floats) -> Iterator[ReliabilityBin]:
    bin_D = (value_D * _BINS).astype(int).clip(0, _BINS - 1)
    for each in np.unique(bin_D):
        inside_D = bin_D == each
        count, rate = int(inside_D.sum()), float(reward_D[inside_D].mean())
        spread = _Z * math.sqrt(rate * (1 - rate) / count + (_Z / (2 * count)) ** 2)
        middle, scale = rate + _Z**2 / (2 * count), 1 + _Z**2 / count
        yield ReliabilityBin(
            count=count,
            value=float(value_D[inside_D].mean()),
            reward=rate,
            low=(middle - spread) / scale,
            high=(middle + spread) / scale,
        )


def _bce(value_D: Floats, reward_D: Floats) -> float:
    value_D = value_D.clip(_PROBABILITY_FLOOR, 1 - _PROBABILITY_FLOOR)
    return float(-(reward_D * np.log(value_D) + (1 - reward_D) * np.log1p(-value_D)).mean())


def _auc_interval(
    value_D: Floats, correct_D: NDArray[np.bool_], problem_D: NDArray[np.int64]
) -> tuple[float, float]:
    generator = np.random.default_rng(0)
    names, inverse_D = np.unique(problem_D, return_inverse=True)
    # Levels are found once; a resample only reweighs them (1,000 resamples in 0.1 s).
    _, level_D = np.unique(value_D, return_inverse=True)
    found = []
    for _ in range(_RESAMPLES):
        times = np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))
        weight_D = times[inverse_D].astype(np.float64)
        positive = np.bincount(level_D, weight_D * correct_D)
        negative = np.bincount(level_D, weight_D * ~correct_D)
        below = np.cumsum(negative) - negative
        pairs = positive.sum() * negative.sum()
        if pairs > 0:
            found.append(float((positive * (below + 0.5 * negative)).sum() / pairs))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


@define(kw_only=True, eq=False)
class CriticLearner(Learner):
    """Trains a critic on states of the policy's trunk that no gradient leaves.

    Attributes:
        critic: What is trained.
        trunk: The policy's trunk states of a batch, float32; used where the critic reads them.
        accumulation: In how many parts a global batch goes through the critic.
        world: The processes that train together.
        validation: Batches of the validation split, with the problem number of each row.
        best: The folder of the best critic.
        save: Writes the critic as the best one.
        restore: Loads it back.
        report: The last validation.
    """

    critic: Critic
    trunk: Callable[[Batch], Tensor]
    accumulation: int
    world: World = ALONE
    validation: Callable[[], Iterable[tuple[Batch, NDArray[np.int64]]]]
    best: Path
    save: Callable[[], None]
    restore: Callable[[], None]
    stage: str = field(default="critic", init=False)
    headline: str = field(default="value_loss", init=False)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the critic's parameters."""
        return self.critic.parameters()

    def learn(self, batch: Batch, *, step: int) -> Mapping[str, Tensor | float]:
        """Accumulate the gradient of the critic's own loss, each part by its share of the rows."""
        del step
        totals: dict[str, Tensor | float] = {}
        together = 2 if self.critic.batching == "pairs" else 1
        parts = list(split_rows(batch, self.accumulation * self.world.size, together=together))
        mine = self.world.share(parts)
        for part in mine or parts[:1]:  # every process takes part, if with nothing
            share = len(part.ids_BT) / len(batch.ids_BT) if mine else 0.0
            result = self.critic.loss(part, self._states(part))
            (result.loss * share).backward()  # type: ignore[no-untyped-call]
            for name, value in {"value_loss": result.loss.detach(), **result.metrics}.items():
                totals[name] = totals.get(name, 0.0) + share * value
        self.world.sum_gradients(self.parameters())
        return self.world.sum_scalars(totals)

    def validate(self, *, step: int) -> Validation:
        """Judge the final values on the validation split; their cross-entropy selects the checkpoint."""
        del step
        report = self.measure()
        return Validation(metrics=report.metrics(), score=report.auc)

    @torch.no_grad()
    def measure(self) -> CriticReport:
        """Return the report of the critic as it is now."""
        values, rewards, problems = [], [], []
        for batch, problem_B in self.validation():
            scores = self.critic.score(batch, self._states(batch))
            if scores.value_BT is None:
                name = type(self.critic).__name__
                raise RunFailedError(f"critic `{name}` was trained, but gives no values")
            last_B = _last_response_token(batch)
            row_B = torch.arange(len(last_B), device=last_B.device)
            values.append(scores.value_BT[row_B, last_B].double().cpu().numpy())
            rewards.append(batch.reward_BT[row_B, last_B].double().cpu().numpy())
            problems.append(problem_B)
        return report_critic(np.concatenate(values), np.concatenate(rewards), np.concatenate(problems))

    def state_dict(self) -> Mapping[str, Any]:
        """Return what the critic keeps."""
        return self.critic.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s result."""
        self.critic.load_state_dict(laid_out(state, self.critic.state_dict()))

    def save_best(self) -> None:
        """Write the critic's state."""
        self.save()

    def load_best(self) -> None:
        """Load it back."""
        self.restore()

    @torch.no_grad()
    def _states(self, batch: Batch) -> Tensor | None:
        return self.trunk(batch) if self.critic.reads_policy else None


def _last_response_token(batch: Batch) -> Tensor:
    position_T = torch.arange(batch.response_BT.shape[1], device=batch.response_BT.device)
    return (batch.response_BT * position_T).argmax(dim=1)
