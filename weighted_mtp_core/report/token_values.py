"""Makes the table `token_values.jsonl`: value, TD error and weight of each token of validation responses.

Shape letters: B rows, T positions, K heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from attrs import define, evolve
from numpy.typing import NDArray
from torch import Tensor

from weighted_mtp_core.api import Batch, Critic, Scores
from weighted_mtp_core.api.tensors import align_weights, gather_by_target
from weighted_mtp_core.data.batches import split_rows
from weighted_mtp_core.data.token_texts import token_texts
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.model.targets import batch_labels, target_mask
from weighted_mtp_core.report.token_measures import array, changes, plain
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.prepare import Prepared

VALUES_FILE = "token_values.jsonl"
Floats = NDArray[np.float64]


def table_of_values(
    prepared: Prepared, learner: PolicyLearner, *, critic: Critic, batches: Iterable[Batch]
) -> str:
    """Return the text of the file, with one line for each response token.

    The keys of a line are:

    - `example`: the id of the example;
    - `reward`: the reward of the whole response;
    - `position`: position of the token in the response, from 0;
    - `token`: the text of the token;
    - `value`: the critic's value of the prefix that ends with the token, at most 1;
    - `change`: the TD error of the token with discount gamma = 1; null for the first token of a document;
    - `weight`: mean weight of the token over the heads that predict it; null if there is no such head, or if
      the weighting fails, for example because it can only compute weights for training batches.

    Args:
        prepared: Tokenizer and policy.
        learner: The learner of stage 2, whose weighting has its final state.
        critic: A critic that computes values for any batch, not only the batches of stage 2.
        batches: Batches with one response per row; the weighting receives each batch as a whole.
    """
    lines: list[str] = []
    for batch in batches:
        scores = _scores(prepared, critic, batch)
        values_BT, weights_BT = _values(prepared, scores), _weights(learner, batch, scores)
        rows = zip(split_rows(batch, len(batch.ids_BT)), values_BT, weights_BT, strict=True)
        for part, value_T, weight_T in rows:
            tokens = _tokens(prepared.codec.tokenizer, part, value_T=value_T, weight_T=weight_T)
            lines += [json.dumps(token, ensure_ascii=False) + "\n" for token in tokens]
    return "".join(lines)


@define(eq=False)
class _Scored(Critic):
    """Returns the scores of a batch that another critic has computed."""

    scores: Scores
    reads_policy = False

    def score(self, batch: Batch, hidden_BTH: Tensor | None) -> Scores:
        del batch, hidden_BTH
        return self.scores


@torch.no_grad()
def _scores(prepared: Prepared, critic: Critic, batch: Batch) -> Scores:
    return prepared.scores(critic, batch, prepared.trunk(batch) if critic.reads_policy else None)


def _values(prepared: Prepared, scores: Scores) -> Floats:
    values_BT = prepared.values(scores)
    assert values_BT is not None
    return np.minimum(values_BT, 1.0)


def _weights(learner: PolicyLearner, batch: Batch, scores: Scores) -> Floats:
    """Return the weight of each token, `[B, T]`; NaN for tokens without a weight."""
    # The scores are those of the whole batch, so the weighting must not receive the batch in parts.
    weighting = evolve(learner.weighting, critic=_Scored(scores))
    learner = evolve(learner, weighting=weighting, accumulation=1, distributed=SINGLE_PROCESS)
    labels_BTK = batch_labels(batch, learner.policy.n_future)
    try:
        weight = learner.weigh(batch, step=learner.steps).weight
    except RunFailedError:  # some weightings support only training batches; the report contains the reason
        return np.full(tuple(batch.ids_BT.shape), np.nan)
    return array(mean_over_heads(weight, target_mask(labels_BTK)))


def mean_over_heads(weight: Tensor, target_BTK: Tensor) -> Tensor:
    """Return each token's mean weight over the heads that predict it, `[B, T]`; NaN if no head does.

    Args:
        weight: Weights `[B, T]` or `[B, T, K]` that a weighting returned.
        target_BTK: bool, True where head k learns its target from source position t, see `target_mask`.
    """
    total_BT = gather_by_target(align_weights(weight, target_BTK), target_BTK).sum(dim=-1)
    return total_BT / gather_by_target(target_BTK.float(), target_BTK).sum(dim=-1)


def _tokens(tokenizer: Any, row: Batch, *, value_T: Floats, weight_T: Floats) -> Iterator[dict[str, Any]]:
    """Yield one line of the table for each response token in a batch of one row."""
    positions = np.flatnonzero(array(row.response_BT[0]) > 0)
    reward = float(row.reward_BT[0, int(positions[-1])])
    change_T = changes(value_T, positions, reward)
    texts: Sequence[str] = token_texts(tokenizer, row.ids_BT[0].cpu()[positions].tolist())
    for position, (t, text) in enumerate(zip(positions, texts, strict=True)):
        yield {
            "example": row.example_ids[0],
            "reward": reward,
            "position": position,
            "token": text,
            "value": plain(value_T[t]),
            "change": plain(change_T[t]),
            "weight": plain(weight_T[t]),
        }
