"""Stage 1: training of the critic, and the proof that it beats a constant.

Shape letters: B rows, T positions, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import define, field, fields, frozen
from numpy.typing import NDArray
from torch import Tensor, nn

from weighted_mtp_core.api import Batch, Critic
from weighted_mtp_core.data.batches import split_rows
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.metrics.critic import (
    CriticMeasures,
    Floats,
    LengthOnly,
    ReliabilityBin,
    ScoredResponses,
)
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed, laid_out
from weighted_mtp_core.training.loop import Learner, Validation

_RESAMPLES = 1000
_BINS = 10
_Z = 1.96  # of a 95 % interval


@frozen(kw_only=True)
class CriticReport:
    """How well values tell right responses from wrong ones, beside two critics that know next to nothing.

    Attributes:
        critic: Measures of the critic.
        constant: Those of the constant that knows this split's mean reward.
        length_only: Those of a logistic regression on the number of tokens, fitted on the training split.
        auc_low: Lower end of the 95 % interval of the critic's AUC (bootstrap over problems).
        auc_high: Upper end.
        reliability: Ten bins of equal width from 0 to 1, without those that hold no response.
    """

    critic: CriticMeasures
    constant: CriticMeasures
    length_only: CriticMeasures
    auc_low: float
    auc_high: float
    reliability: tuple[ReliabilityBin, ...]

    @property
    def informative(self) -> bool:
        """Whether the interval of the AUC lies above chance."""
        return self.auc_low > 0.5

    @property
    def words(self) -> str:
        """What a person wants to know first."""
        return (
            f"AUC {self.critic.auc:.3f}, 95 % interval [{self.auc_low:.3f}, {self.auc_high:.3f}], "
            f"on held-out responses (a constant has 0.5, length alone {self.length_only.auc:.3f})"
        )

    def metrics(self) -> dict[str, float]:
        """Return the report as metrics."""
        return {
            "critic_auc_low": self.auc_low,
            "critic_auc_high": self.auc_high,
            **self.critic.metrics("critic_"),
            **self.constant.metrics("critic_constant_"),
            **self.length_only.metrics("critic_length_only_"),
        }


def report_critic(judged: ScoredResponses, rule: LengthOnly) -> CriticReport:
    """Compare values with rewards.

    Responses to one problem are not independent, so the interval resamples problems, not responses.

    Args:
        judged: Values and rewards of held-out responses.
        rule: What lengths alone say, by the training split.

    Raises:
        RunFailedError: The responses are all right or all wrong, so nothing can be told; or values are not
            finite.
    """
    if not (np.isfinite(judged.value_N).all() and np.isfinite(judged.before_D).all()):
        raise RunFailedError(
            "the critic gives values that are not finite: NaN or infinity",
            hint="lower its learning rate (`critic.train.learning_rate`)",
        )
    correct_D = judged.correct_D
    if correct_D.all() or not correct_D.any():
        raise RunFailedError(
            f"all {len(correct_D)} validation responses are {'correct' if correct_D.any() else 'incorrect'}: "
            "a critic cannot be validated on them",
            hint="choose data with right and wrong responses in the split `validation`",
        )
    low, high = _auc_interval(judged.final_D, correct_D, judged.problem_D)
    return CriticReport(
        critic=CriticMeasures.of(judged),
        constant=CriticMeasures.of(judged.by_constant()),
        length_only=CriticMeasures.of(judged.by_length(rule)),
        auc_low=low,
        auc_high=high,
        reliability=tuple(_reliability(judged.final_D, judged.reward_D)),
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
        steps: How many there are in all, which schedules go by.
        accumulation: In how many parts a global batch goes through the critic.
        distributed: The processes that train together.
        validation: Batches of the validation split, with the problem number of each row.
        length_only: What lengths alone say of a response, by the training split.
        best: The folder of the best critic.
        save: Writes the critic as the best one.
        restore: Loads it back.
        report: The last validation.
    """

    critic: Critic
    trunk: Callable[[Batch], Tensor]
    steps: int
    accumulation: int
    distributed: Distributed = SINGLE_PROCESS
    validation: Callable[[], Iterable[tuple[Batch, NDArray[np.int64]]]]
    length_only: Callable[[], LengthOnly]
    best: Path
    save: Callable[[], None]
    restore: Callable[[], None]
    stage: str = field(default="critic", init=False)
    loss_name: str = field(default="value_loss", init=False)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the critic's parameters."""
        return self.critic.parameters()

    def learn(self, batch: Batch, *, step: int) -> Mapping[str, Tensor | float]:
        """Accumulate the gradient of the critic's own loss, each part by its share of the rows."""
        self.critic.begin_step(step, steps=self.steps)
        totals: dict[str, Tensor | float] = {}
        together = 2 if self.critic.batching == "pairs" else 1
        rows = len(batch.ids_BT)
        parts = [
            (part, len(part.ids_BT) / rows)
            for part in split_rows(batch, self.accumulation * self.distributed.size, together=together)
        ]
        for part, share in self.distributed.shard_evenly(parts, spare=(parts[0][0], 0.0)):
            result = self.critic.loss(part, self._states(part))
            (result.loss * share).backward()  # type: ignore[no-untyped-call]
            for name, value in {"value_loss": result.loss.detach(), **result.metrics}.items():
                totals[name] = totals.get(name, 0.0) + share * value
        self.distributed.all_reduce_gradients(self.parameters())
        return self.distributed.all_reduce_scalars(totals)

    def validate(self, *, step: int) -> Validation:
        """Judge the final values on the validation split; their AUC selects the checkpoint."""
        del step
        report = self.measure()
        return Validation(metrics=report.metrics(), score=report.critic.auc)

    @torch.no_grad()
    def measure(self) -> CriticReport:
        """Return the report of the critic as it is now."""
        parts = []
        for batch, problem_B in self.validation():
            scores = self.critic.score(batch, self._states(batch))
            if scores.value_BT is None:
                name = type(self.critic).__name__
                raise RunFailedError(f"critic `{name}` was trained, but gives no values")
            parts.append(_judged(batch, scores.value_BT, problem_B))
        return report_critic(_together(parts), self.length_only())

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


def _judged(batch: Batch, value_BT: Tensor, problem_B: NDArray[np.int64]) -> ScoredResponses:
    """Return the values of a batch with one document a row; rows without a response are left out."""
    response_BT = batch.response_BT.cpu().numpy()
    values_BT, rewards_BT = value_BT.cpu().double().numpy(), batch.reward_BT.cpu().double().numpy()
    length_B = response_BT.sum(axis=1)
    row_B = np.flatnonzero(length_B)
    first_B = response_BT.argmax(axis=1)[row_B]
    return ScoredResponses(
        value_N=values_BT[response_BT],
        before_D=values_BT[row_B, np.maximum(first_B - 1, 0)],
        length_D=length_B[row_B],
        reward_D=rewards_BT[row_B, first_B],
        problem_D=problem_B[row_B],
    )


def _together(parts: Sequence[ScoredResponses]) -> ScoredResponses:
    return ScoredResponses(
        **{
            each.name: np.concatenate([getattr(p, each.name) for p in parts])
            for each in fields(ScoredResponses)
        }
    )
