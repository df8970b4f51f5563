"""Measures weight, value, TD error and losses of each token of correct and incorrect validation responses.

Shape letters: D documents, B rows, T positions, K heads, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from numpy.typing import NDArray
from torch import Tensor

from weighted_mtp_core.api import Batch, Critic, is_correct
from weighted_mtp_core.api.tensors import align_weights, gather_by_target
from weighted_mtp_core.data.batches import split_rows
from weighted_mtp_core.data.texts import TextCodec
from weighted_mtp_core.data.token_texts import token_texts
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.metrics.critic_report import ReliabilityBin
from weighted_mtp_core.model.pair_predictions import PairPredictions
from weighted_mtp_core.model.targets import batch_labels, target_mask
from weighted_mtp_core.report.token_report import ProblemTokens, Solution, Token, TokenReport
from weighted_mtp_core.runtime.device import evaluation_mode
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.prepare import Prepared

_WEIGHED = 16  # maximum problems in the batch; several, as some weightings compare responses within a batch
_SHOWN = 6  # maximum problems in the report
_LONGEST = 800  # maximum tokens of a response in the report


@torch.no_grad()
def measure_tokens(
    prepared: Prepared,
    learner: PolicyLearner,
    *,
    critic: Critic | None,
    reliability: Sequence[ReliabilityBin] = (),
) -> TokenReport:
    """Compute the weights of some validation responses as one batch, and measure the tokens of a few of them.

    Args:
        prepared: Data, tokenizer and policy; the policy has the parameters of its best state.
        learner: The learner of stage 2, whose weighting has its final state.
        critic: A critic that can score any batch, not only the batches of stage 2; None without a critic.
        reliability: Bins of the critic's values, with the mean reward of each bin.
    """
    labelled = len(prepared.source.examples("validation")) > 0
    tokens = prepared.critic_tokens("validation") if labelled else prepared.policy_tokens("validation")
    problems = choose_problems(tokens, at_most=_WEIGHED)
    batch = prepared.batch(tokens, np.array([row for rows in problems for row in rows]))
    learner = evolve(learner, weighting=evolve(learner.weighting, critic=critic), distributed=SINGLE_PROCESS)
    weight_D, unweighed = _weigh(learner, batch)
    if unweighed:
        prepared.log(f"WARNING: the page shows no weights: {unweighed}")
    rows = iter(zip(split_rows(batch, len(batch.ids_BT)), weight_D, strict=True))
    shown = []
    for numbers in problems[:_SHOWN]:
        with evaluation_mode(prepared.policy):
            seen = [
                _MeasuredRow.measure(prepared, part, weight, critic)
                for _ in numbers
                for part, weight in [next(rows)]
            ]
        solutions = tuple(each.solution(prepared.codec.tokenizer) for each in seen)
        shown.append(ProblemTokens(prompt=seen[0].prompt(prepared.codec), solutions=solutions))
    return TokenReport(
        step=learner.steps,
        rows=len(batch.ids_BT),
        unweighed=unweighed,
        problems=tuple(shown),
        reliability=tuple(reliability),
    )


def _weigh(learner: PolicyLearner, batch: Batch) -> tuple[Sequence[Tensor | None], str]:
    """Return the weights of each row and an empty text; without weights, None for each row and the reason.

    Some weightings can only compute weights for training batches. The run is already complete when the report
    is written, so missing weights must not make the run fail.
    """
    try:
        return torch.split(learner.weigh(batch, step=learner.steps).weight, 1), ""
    except RunFailedError as error:
        return [None] * len(batch.ids_BT), str(error)


def choose_problems(tokens: TokenSet, *, at_most: int) -> list[tuple[int, ...]]:
    """Return, for at most `at_most` problems, the numbers of the first correct and first incorrect response.

    Some problems have only one of the two responses; problems that have both come first.
    """
    correct_D = is_correct(tokens.reward_D)
    firsts: dict[int, list[int]] = {}
    for chosen_D in (correct_D, ~correct_D):
        rows = np.flatnonzero(chosen_D)
        _, first = np.unique(tokens.problem_D[rows], return_index=True)
        for row in rows[np.sort(first)]:
            firsts.setdefault(int(tokens.problem_D[row]), []).append(int(row))
    return [
        tuple(rows) for rows in sorted(firsts.values(), key=lambda rows: (-len(rows), min(rows)))[:at_most]
    ]


@frozen(kw_only=True, eq=False)
class _MeasuredRow:
    """One document, `[1, T]`, and its measures by position of the target; NaN for missing measures."""

    batch: Batch
    weight_TK: NDArray[np.float64]
    per_head: bool
    loss_TK: NDArray[np.float64]
    value_T: NDArray[np.float64]

    @classmethod
    def measure(
        cls, prepared: Prepared, batch: Batch, weight: Tensor | None, critic: Critic | None
    ) -> _MeasuredRow:
        """Measure a batch of one row; `weight` is `[1, T]` or `[1, T, K]`, or None if it is unknown."""
        policy = prepared.policy
        labels_BTK = batch_labels(batch, policy.n_future)
        target_BTK = target_mask(labels_BTK)
        with prepared.compute.autocast():
            hidden_BTH = policy.trunk_states(batch.ids_BT, position_BT=batch.position_BT)
            loss_BTK = PairPredictions(
                policy, hidden_BTH, labels_BTK, ids_BT=batch.ids_BT, position_BT=batch.position_BT
            ).losses()
        values_BT = None
        if critic is not None:
            states_BTH = hidden_BTH if critic.reads_policy else None
            scores = prepared.scores(critic, batch, states_BTH)
            values_BT = prepared.values(scores)
        return cls(
            batch=batch,
            weight_TK=(
                np.full(target_BTK.shape[1:], np.nan)
                if weight is None
                else _by_target(align_weights(weight, target_BTK), target_BTK)
            ),
            per_head=weight is not None and weight.ndim == 3,
            loss_TK=_by_target(loss_BTK, target_BTK),
            value_T=(
                np.full(batch.ids_BT.shape[1], np.nan) if values_BT is None else np.minimum(values_BT[0], 1.0)
            ),
        )

    def prompt(self, codec: TextCodec) -> str:
        """Return the text before the response, without BOS; a chat's control tokens appear by name."""
        ids_T, response_T = self.batch.ids_BT[0], self.batch.response_BT[0]
        ids = ids_T[: int(response_T.int().argmax())].tolist()
        start = len(codec.prefix)
        return codec.decode_marked(ids[start:] if tuple(ids[:start]) == codec.prefix else ids)

    def solution(self, tokenizer: Any) -> Solution:
        """Return the response with its first tokens; for a chat, tokens from the first learned turn on."""
        is_target_T = self.batch.response_BT[0].cpu().numpy()
        learned = np.flatnonzero(is_target_T)
        reward = float(self.batch.reward_BT[0, int(learned[-1])])
        change_T = changes(self.value_T, learned, reward)
        positions = np.arange(learned[0], learned[-1] + 1)
        texts = token_texts(tokenizer, self.batch.ids_BT[0].cpu()[positions].tolist())
        tokens = tuple(
            Token(
                text=text,
                weight=plain(np.nan if np.isnan(self.weight_TK[t]).all() else np.nanmean(self.weight_TK[t])),
                weight_K=tuple(map(plain, self.weight_TK[t])) if self.per_head else (),
                loss_K=tuple(map(plain, self.loss_TK[t])),
                value=plain(self.value_T[t]) if is_target_T[t] else None,
                change=plain(change_T[t]),
                is_target=bool(is_target_T[t]),
            )
            for t, text in list(zip(positions, texts, strict=True))[:_LONGEST]
        )
        name = self.batch.example_ids[0]
        return Solution(name=name, reward=reward, tokens=tokens, more=len(positions) - len(tokens))


def changes(value_T: NDArray[np.float64], positions: NDArray[np.int64], reward: float) -> NDArray[np.float64]:
    """Return the TD error of each response token with discount gamma = 1.

    The result is NaN for other tokens, and where a value is unknown.

    Args:
        value_T: V_t, the value of the prefix that ends at token t.
        positions: Positions of the response's tokens.
        reward: Reward of the response, received at its last token, after which V is 0.
    """
    change_T = np.full_like(value_T, np.nan)
    before = np.where(positions > 0, value_T[positions - 1], np.nan)
    after = value_T[positions].copy()
    after[-1] = reward
    change_T[positions] = after - before
    return change_T


def _by_target(x_BTK: Tensor, target_BTK: Tensor) -> NDArray[np.float64]:
    """Return a row's values as `[T, K]`, indexed by target and head; NaN for a head without this target."""
    found_BTK = gather_by_target(torch.ones_like(x_BTK), target_BTK) > 0
    return np.where(array(found_BTK[0]) > 0, array(gather_by_target(x_BTK, target_BTK)[0]), np.nan)


def array(x: Tensor) -> NDArray[np.float64]:
    """Return a tensor as a float64 array on the host."""
    return x.cpu().double().numpy()  # first to the CPU, because MPS has no float64


def plain(value: float) -> float | None:
    """Round a number to five significant digits, as it is stored in files; return None for NaN."""
    return None if np.isnan(value) else float(f"{value:.5g}")
