"""Measures of a critic's values, and two baselines: a constant, and a critic that uses only lengths.

A measure does not show that the critic uses the text if a baseline reaches the same value; `critic_report.py`
compares the critic with both baselines.

Shape letters: N tokens of all responses, D responses, P responses to one problem.
"""

from __future__ import annotations

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
    """A critic's values of all prefixes of some responses, and the rewards of the responses.

    Attributes:
        value_N: For each response token, the value of the prefix that ends with this token; responses are
            concatenated. Values can be above 1 if the critic determines values only up to a factor.
        before_D: Value of the prompt or, for a response without a prompt, the value after its first token.
        length_D: Number of tokens of each response, at least 1.
        reward_D: Reward of each response, in [0, 1].
        problem_D: Problem number of each response.
        slip_N: bool, True for tokens at a known mistake; None if the data do not mark mistakes.
    """

    value_N: Floats
    before_D: Floats
    length_D: Ints
    reward_D: Floats
    problem_D: Ints
    slip_N: NDArray[np.bool_] | None = None

    @property
    def start_D(self) -> Ints:
        """Index of each response's first token in `value_N`."""
        starts: Ints = self.length_D.cumsum() - self.length_D
        return starts

    @property
    def final_D(self) -> Floats:
        """Value after the last token of each response, which is the value of the whole response."""
        return self.values_after(1.0)

    def values_after(self, share: float) -> Floats:
        """Return each response's value after the given share of its tokens, rounded up to whole tokens."""
        tokens_D = np.ceil(share * self.length_D).astype(np.int64)
        values: Floats = self.value_N[self.start_D + np.maximum(tokens_D, 1) - 1]
        return values

    @property
    def as_probabilities(self) -> ScoredResponses:
        """A copy of the responses in which all values above 1 are replaced with 1."""
        return attrs.evolve(
            self, value_N=np.minimum(self.value_N, 1.0), before_D=np.minimum(self.before_D, 1.0)
        )

    @property
    def correct_D(self) -> NDArray[np.bool_]:
        """Mask of the correct responses."""
        right: NDArray[np.bool_] = is_correct(self.reward_D)
        return right

    def by_constant(self) -> ScoredResponses:
        """Return a copy of the responses in which every value is the best constant, the mean reward."""
        mean = self.reward_D.mean()
        return attrs.evolve(
            self, value_N=np.full_like(self.value_N, mean), before_D=np.full_like(self.before_D, mean)
        )

    def by_length(self, length_only: LengthOnly) -> ScoredResponses:
        """Return a copy with the values of a critic that uses only the number of tokens so far."""
        so_far_N = np.arange(len(self.value_N)) - np.repeat(self.start_D, self.length_D) + 1
        zero_D = np.zeros_like(self.length_D)
        return attrs.evolve(self, value_N=length_only.values(so_far_N), before_D=length_only.values(zero_D))


@frozen(kw_only=True)
class LengthOnly:
    """A critic that uses only the length of a response."""

    slope: float
    intercept: float

    @classmethod
    def fit(cls, length_D: Ints, reward_D: Floats) -> LengthOnly:
        """Fit a logistic regression of correctness on the number of response tokens.

        Lengths are standardised. scikit-learn's L2 penalty matters only if there are few responses, or if
        their lengths separate correct from incorrect ones perfectly. If all lengths or all outcomes are
        equal, the slope is 0.
        """
        from sklearn.linear_model import LogisticRegression  # takes a second; only critics need it

        correct_D = is_correct(reward_D)
        mean, std = float(length_D.mean()), float(length_D.std())
        if std == 0 or correct_D.all() or not correct_D.any():
            rate = (correct_D.sum() + 0.5) / (len(correct_D) + 1)  # Krichevsky-Trofimov: finite log-odds
            return cls(slope=0.0, intercept=float(np.log(rate / (1 - rate))))
        model = LogisticRegression().fit((length_D[:, None] - mean) / std, correct_D)
        slope = float(model.coef_[0, 0]) / std
        return cls(slope=slope, intercept=float(model.intercept_[0]) - slope * mean)

    def values(self, length: Ints) -> Floats:
        """Return the probability that responses with these numbers of tokens are correct."""
        odds: Floats = np.exp(-(self.slope * length + self.intercept).clip(-700, 700))
        return 1 / (1 + odds)


@frozen(kw_only=True)
class CriticMeasures:
    """Measures of how well a critic's values fit the rewards of responses.

    A pair of responses with equal values counts as half correct. In rank correlations, equal values share
    their mean rank. Values above 1 count as 1, except in the AUCs and in `pairwise_accuracy`, which compare
    values.

    Attributes:
        auc: Share of all pairs of a correct and an incorrect response in which the correct one has the higher
            final value; 0.5 for a constant.
        auc_half: Like `auc`, but with the values after 50 % of the tokens of each response.
        auc_quarter: Like `auc`, but with the values after 25 % of the tokens of each response.
        pairwise_accuracy: Like `auc`, but only over pairs of responses to the same problem; None if no
            problem has both correct and incorrect responses.
        bce: Mean binary cross-entropy of the final values, in nats.
        brier: Mean squared difference of final value and reward (Brier 1950).
        ece: Expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599, eq. 3): distance
            between the mean final value and the mean reward of the responses in a bin, averaged over 15 bins
            of equal width; each bin has a weight proportional to its number of responses.
        margin: Mean final value of correct responses minus mean final value of incorrect responses.
        td_spikiness: The largest |TD error| of a response divided by the mean |TD error|, averaged over
            responses. For one response, the ratio is the length of the response if only one TD error is not
            0, and 1 if all |TD errors| are equal. The TD error of token t is V_t - V_{t-1}, or
            reward - V_{t-1} at the last token, where V_t is the value of the prefix that ends at token t.
        position_correlation: Spearman's correlation of value and position within a response, averaged over
            responses; 0 for a response with equal values.
        length_correlation: Spearman's correlation of final value and length; 0 if all final values or all
            lengths are equal.
        falls_at_slip: Share of the incorrect responses with a known mistake in which the largest fall of the
            value is at a mistake. If n tokens of a response have the same largest fall, each of these tokens
            counts 1 / n. For a constant critic, `falls_at_slip` is the mean share of tokens at a mistake,
            which is the result by chance. None if no incorrect response has a known mistake.
    """

    auc: float
    auc_half: float
    auc_quarter: float
    pairwise_accuracy: float | None
    bce: float
    brier: float
    ece: float
    margin: float
    td_spikiness: float
    position_correlation: float
    length_correlation: float
    falls_at_slip: float | None

    @classmethod
    def of(cls, scored: ScoredResponses) -> CriticMeasures:
        """Compute the measures; the responses must contain both correct and incorrect ones."""
        reward_D, correct_D = scored.reward_D, scored.correct_D
        ranked, scored = scored, scored.as_probabilities
        final_D = scored.final_D
        return cls(
            **aucs(ranked),
            pairwise_accuracy=_pairwise_accuracy(ranked.final_D, correct_D, scored.problem_D),
            bce=_cross_entropy(final_D, reward_D),
            brier=float(np.square(final_D - reward_D).mean()),
            ece=_calibration_error(final_D, reward_D),
            margin=float(final_D[correct_D].mean() - final_D[~correct_D].mean()),
            td_spikiness=_spikiness(scored),
            position_correlation=_position_correlation(scored),
            length_correlation=_length_correlation(scored),
            falls_at_slip=_falls_at_slip(scored),
        )

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the measures that are not None, with `prefix` before each name."""
        return {f"{prefix}{name}": value for name, value in attrs.asdict(self).items() if value is not None}


def aucs(scored: ScoredResponses) -> dict[str, float]:
    """Return the AUCs of `CriticMeasures` by name; empty if all responses are correct or all incorrect."""
    from sklearn.metrics import roc_auc_score

    correct_D = scored.correct_D
    if correct_D.all() or not correct_D.any():
        return {}
    shares = {"auc": 1.0, "auc_half": 0.5, "auc_quarter": 0.25}
    return {
        name: float(roc_auc_score(correct_D, scored.values_after(share))) for name, share in shares.items()
    }


def _pairwise_accuracy(final_D: Floats, correct_D: NDArray[np.bool_], problem_D: Ints) -> float | None:
    won = pairs = 0.0
    order_D = np.argsort(problem_D, kind="stable")
    for members in np.split(order_D, np.flatnonzero(np.diff(problem_D[order_D])) + 1):
        values_P, correct_P = final_D[members], correct_D[members]
        difference = values_P[correct_P][:, None] - values_P[~correct_P][None, :]
        won += float((difference > 0).sum() + 0.5 * (difference == 0).sum())
        pairs += difference.size
    return won / pairs if pairs else None


def _cross_entropy(value_D: Floats, reward_D: Floats) -> float:
    value_D = value_D.clip(_PROBABILITY_FLOOR, 1 - _PROBABILITY_FLOOR)
    return float(-(reward_D * np.log(value_D) + (1 - reward_D) * np.log1p(-value_D)).mean())


def _calibration_error(value_D: Floats, reward_D: Floats) -> float:
    bin_D = (value_D * _BINS).astype(int).clip(0, _BINS - 1)
    return float(np.abs(np.bincount(bin_D, value_D - reward_D)).sum() / len(value_D))


def temporal_differences(scored: ScoredResponses) -> Floats:
    """Return the TD error of each token, `[N]`, with gamma = 1; see `CriticMeasures.td_spikiness`."""
    after_N = scored.value_N.copy()
    after_N[scored.start_D + scored.length_D - 1] = scored.reward_D
    change_N: Floats = after_N - _values_before(scored)
    return change_N


def _values_before(scored: ScoredResponses) -> Floats:
    """Return the value of the prefix before each token, `[N]`."""
    before_N = np.concatenate([scored.before_D[:1], scored.value_N[:-1]])
    before_N[scored.start_D] = scored.before_D
    return before_N


def _falls_at_slip(scored: ScoredResponses) -> float | None:
    if scored.slip_N is None:
        return None
    cuts = scored.start_D[1:]
    changes = np.split(scored.value_N - _values_before(scored), cuts)
    found = [
        float((slip & (change == change.min())).sum() / (change == change.min()).sum())
        for change, slip, right in zip(changes, np.split(scored.slip_N, cuts), scored.correct_D, strict=True)
        if slip.any() and not right
    ]
    return float(np.mean(found)) if found else None


def _spikiness(scored: ScoredResponses) -> float:
    size_N = np.abs(temporal_differences(scored))
    largest_D = np.maximum.reduceat(size_N, scored.start_D)
    mean_D = np.add.reduceat(size_N, scored.start_D) / scored.length_D
    return float(np.divide(largest_D, mean_D, out=np.ones_like(mean_D), where=mean_D > 0).mean())


def _position_correlation(scored: ScoredResponses) -> float:
    from scipy.stats import rankdata

    values = np.split(scored.value_N, scored.start_D[1:])
    ranks = [(rankdata(each), np.arange(1.0, len(each) + 1)) for each in values]
    return float(np.mean([_correlation(x, y) for x, y in ranks]))


def _length_correlation(scored: ScoredResponses) -> float:
    from scipy.stats import rankdata

    return _correlation(rankdata(scored.final_D), rankdata(scored.length_D))


def _correlation(x: Floats, y: Floats) -> float:
    """Return the correlation of the ranks x and y; 0 if x or y is constant, while scipy returns NaN."""
    scale = x.std() * y.std()
    return 0.0 if scale == 0 else float(((x - x.mean()) * (y - y.mean())).mean() / scale)
