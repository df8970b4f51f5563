"""What a critic's values are worth: measures of them, and two critics that know next to nothing.

Every measure of a critic stands beside that of a constant and of a critic that counts tokens: a figure that
either reaches says nothing about what was written.

Shape letters: N tokens of all responses, D responses, P responses to one problem.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from weighted_mtp_core.api import is_correct

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_BINS = 15
_PROBABILITY_FLOOR = 1e-6  # keeps the logarithm of a saturated value finite


@frozen(kw_only=True, eq=False)
class ScoredResponses:
    """Values of every prefix of some responses, and how the responses turned out.

    Attributes:
        value_N: Value of the prefix that ends with each response token, response after response.
        before_D: Value of the prompt; where there is none, that of the first token.
        length_D: Tokens of each response, at least one.
        reward_D: Reward of each response, in [0, 1].
        problem_D: Equal exactly for responses to one problem.
    """

    value_N: Floats
    before_D: Floats
    length_D: Ints
    reward_D: Floats
    problem_D: Ints

    @property
    def start_D(self) -> Ints:
        """Where each response begins in `value_N`."""
        starts: Ints = self.length_D.cumsum() - self.length_D
        return starts

    @property
    def final_D(self) -> Floats:
        """The value after the last token, of the whole response."""
        finals: Floats = self.value_N[self.start_D + self.length_D - 1]
        return finals

    @property
    def correct_D(self) -> NDArray[np.bool_]:
        """Which responses are right."""
        right: NDArray[np.bool_] = is_correct(self.reward_D)
        return right

    def by_constant(self) -> ScoredResponses:
        """Return what the best constant says: the mean reward of these very responses, everywhere."""
        mean = self.reward_D.mean()
        return attrs.evolve(
            self, value_N=np.full_like(self.value_N, mean), before_D=np.full_like(self.before_D, mean)
        )

    def by_length(self, rule: LengthOnly) -> ScoredResponses:
        """Return what a critic says that only counts the tokens so far."""
        so_far_N = np.arange(len(self.value_N)) - np.repeat(self.start_D, self.length_D) + 1
        nothing_D = np.zeros_like(self.length_D)
        return attrs.evolve(self, value_N=rule.values(so_far_N), before_D=rule.values(nothing_D))


@frozen(kw_only=True)
class LengthOnly:
    """The critic that sees nothing of a response but how long it is."""

    slope: float
    intercept: float

    @classmethod
    def fit(cls, length_D: Ints, reward_D: Floats) -> LengthOnly:
        """Fit a logistic regression of being right on the number of response tokens.

        On the length brought to mean 0 and deviation 1, with the library's L2 penalty, which nothing but a
        handful of perfectly separated responses feels. Where lengths or outcomes are all alike, lengths say
        nothing, and the slope is 0.
        """
        from sklearn.linear_model import LogisticRegression  # a second, which runs without a critic save

        correct_D = is_correct(reward_D)
        mean, std = float(length_D.mean()), float(length_D.std())
        if std == 0 or correct_D.all() or not correct_D.any():
            rate = (correct_D.sum() + 0.5) / (len(correct_D) + 1)  # Krichevsky-Trofimov: finite log-odds
            return cls(slope=0.0, intercept=float(np.log(rate / (1 - rate))))
        model = LogisticRegression().fit((length_D[:, None] - mean) / std, correct_D)
        slope = float(model.coef_[0, 0]) / std
        return cls(slope=slope, intercept=float(model.intercept_[0]) - slope * mean)

    def values(self, length: Ints) -> Floats:
        """Return the probability of being right at these numbers of tokens."""
        odds: Floats = np.exp(-(self.slope * length + self.intercept).clip(-700, 700))
        return 1 / (1 + odds)


@frozen(kw_only=True)
class CriticMeasures:
    """What is measured of values; of ties each counts half, and of equal ranks the mean.

    Attributes:
        auc: Share of all pairs of a right and a wrong response in which the right one has the higher final
            value; a constant has 0.5.
        pairwise_accuracy: The same of pairs within one problem; None without such a pair.
        bce: Mean binary cross-entropy of the final values, in nats.
        brier: Mean squared difference of final value and reward (Brier 1950).
        ece: Expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599, eq. 3): mean
            distance of value and reward in 15 bins of equal width.
        margin: Mean final value of right less that of wrong responses.
        td_spikiness: Largest over mean |TD error| of a response, averaged over responses: its length, if one
            token changes everything, 1 if every token changes as much (or none does). TD errors are
            V_t - V_{t-1}, and R - V_{t-1} at the last token.
        position_correlation: Spearman's correlation of value and position within a response, averaged over
            responses; 0 for a response whose values are all alike.
        length_correlation: Spearman's correlation of final value and length.
    """

    auc: float
    pairwise_accuracy: float | None
    bce: float
    brier: float
    ece: float
    margin: float
    td_spikiness: float
    position_correlation: float
    length_correlation: float

    @classmethod
    def of(cls, judged: ScoredResponses) -> CriticMeasures:
        """Measure; there are right and wrong responses."""
        from sklearn.metrics import roc_auc_score

        final_D, reward_D, correct_D = judged.final_D, judged.reward_D, judged.correct_D
        return cls(
            auc=float(roc_auc_score(correct_D, final_D)),
            pairwise_accuracy=_pairwise_accuracy(final_D, correct_D, judged.problem_D),
            bce=_cross_entropy(final_D, reward_D),
            brier=float(np.square(final_D - reward_D).mean()),
            ece=_calibration_error(final_D, reward_D),
            margin=float(final_D[correct_D].mean() - final_D[~correct_D].mean()),
            td_spikiness=_spikiness(judged),
            position_correlation=_position_correlation(judged),
            length_correlation=_rank_correlation(final_D, judged.length_D),
        )

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return what could be measured, with a prefix before each name."""
        return {f"{prefix}{name}": value for name, value in attrs.asdict(self).items() if value is not None}


@frozen(kw_only=True)
class ReliabilityBin:
    """Responses with similar final values, and their rewards.

    Attributes:
        count: Number of responses.
        value: Mean value.
        reward: Mean reward; equal to `value` for a calibrated critic.
        low: Lower end of the 95 % interval of `reward` (Wilson 1927), responses taken as independent.
        high: Upper end.
    """

    count: int
    value: float
    reward: float
    low: float
    high: float


def _pairwise_accuracy(final_D: Floats, correct_D: NDArray[np.bool_], problem_D: Ints) -> float | None:
    won = pairs = 0.0
    for values_P, correct_P in _by_problem(final_D, correct_D, problem_D):
        difference = values_P[correct_P][:, None] - values_P[~correct_P][None, :]
        won += float((difference > 0).sum() + 0.5 * (difference == 0).sum())
        pairs += difference.size
    return won / pairs if pairs else None


def _by_problem(
    final_D: Floats, correct_D: NDArray[np.bool_], problem_D: Ints
) -> Iterator[tuple[Floats, NDArray[np.bool_]]]:
    order_D = np.argsort(problem_D, kind="stable")
    for members in np.split(order_D, np.flatnonzero(np.diff(problem_D[order_D])) + 1):
        yield final_D[members], correct_D[members]


def _cross_entropy(value_D: Floats, reward_D: Floats) -> float:
    value_D = value_D.clip(_PROBABILITY_FLOOR, 1 - _PROBABILITY_FLOOR)
    return float(-(reward_D * np.log(value_D) + (1 - reward_D) * np.log1p(-value_D)).mean())


def _calibration_error(value_D: Floats, reward_D: Floats) -> float:
    bin_D = (value_D * _BINS).astype(int).clip(0, _BINS - 1)
    return float(np.abs(np.bincount(bin_D, value_D - reward_D)).sum() / len(value_D))


def changes(judged: ScoredResponses) -> Floats:
    """Return the TD error of each token, `[N]`, with gamma = 1: the last one's is R less the value before."""
    before_N = np.concatenate([judged.before_D[:1], judged.value_N[:-1]])
    before_N[judged.start_D] = judged.before_D
    after_N = judged.value_N.copy()
    after_N[judged.start_D + judged.length_D - 1] = judged.reward_D
    change_N: Floats = after_N - before_N
    return change_N


def _spikiness(judged: ScoredResponses) -> float:
    size_N = np.abs(changes(judged))
    largest_D = np.maximum.reduceat(size_N, judged.start_D)
    mean_D = np.add.reduceat(size_N, judged.start_D) / judged.length_D
    return float(np.divide(largest_D, mean_D, out=np.ones_like(mean_D), where=mean_D > 0).mean())


def _position_correlation(judged: ScoredResponses) -> float:
    values = np.split(judged.value_N, judged.start_D[1:])
    return float(np.mean([_rank_correlation(each, np.arange(len(each))) for each in values]))


def _rank_correlation(x: Floats | Ints, y: Floats | Ints) -> float:
    """Return Spearman's correlation; 0 where one side is a constant."""
    x_ranks, y_ranks = _ranks(x), _ranks(y)
    scale = x_ranks.std() * y_ranks.std()
    if scale == 0:
        return 0.0
    return float(((x_ranks - x_ranks.mean()) * (y_ranks - y_ranks.mean())).mean() / scale)


def _ranks(x: Floats | Ints) -> Floats:
    """Return ranks from 1; equal numbers share the mean of theirs."""
    _, level, count = np.unique(x, return_inverse=True, return_counts=True)
    ranks: Floats = (count.cumsum() - (count - 1) / 2)[level]
    return ranks
