"""Measures how well each head predicts held-out text, and how many of its drafts head 1 confirms.

K is the number of heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from attrs import fields
from torch import Tensor

from weighted_mtp_core.api import Batch
from weighted_mtp_core.data.batches import preceding
from weighted_mtp_core.model.pair_predictions import HeadSums, PairPredictions
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import batch_labels
from weighted_mtp_core.recipe.train_table import SelectBy
from weighted_mtp_core.runtime.device import evaluation_mode

MEASURES: Mapping[SelectBy, str] = {
    "head_1": "held-out loss",
    "later_heads": "held-out loss of heads 2..K",
    "acceptance": "held-out tokens per pass",
}
"""Description of the validation score for each value of `train.select_by`."""


@torch.no_grad()
def head_quality(
    policy: Policy, batches: Iterable[Batch], *, split: str, autocast: Callable[[], torch.autocast]
) -> dict[str, float]:
    """Return measures of the heads over all targets of the batches; a measure without targets is NaN.

    Returns:
        Metrics by name. For each head k, `<split>_ce_head_<k>` is the unweighted cross-entropy in nats per
            target, and `<split>_accuracy_head_<k>` is the share of the targets that are the head's most
            likely token. For k >= 2, `<split>_acceptance_head_<k>` is the share of the head's most likely
            tokens that head 1 confirms. For K >= 2, `<split>_acceptance_length` is the expected number of
            tokens per forward pass of greedy self-speculative decoding: 1 + the mean number of accepted
            drafts. These metrics need no generated text: the heads read the batches, see `HeadSums`.
    """
    found: list[HeadSums] = []
    for batch in batches:
        with evaluation_mode(policy), autocast():
            hidden_BTH = policy.trunk_states(batch.ids_BT, position_BT=batch.position_BT)
            predictions = PairPredictions(
                policy,
                hidden_BTH,
                batch_labels(batch, policy.n_future),
                ids_BT=batch.ids_BT,
                position_BT=batch.position_BT,
                preceding_BT=preceding(batch),
            )
            found.append(predictions.sums())
    total = {
        each.name: torch.stack([getattr(sums, each.name) for sums in found]).sum(dim=0)
        for each in fields(HeadSums)
    }
    values = {
        **per_head(f"{split}_ce", total["ce_sum_K"] / total["count_K"]),
        **per_head(f"{split}_accuracy", total["correct_K"] / total["count_K"]),
    }
    if policy.n_future > 1:
        values |= per_head(f"{split}_acceptance", (total["confirmed_K"] / total["count_K"])[1:], first=2)
        values[f"{split}_acceptance_length"] = 1 + total["accepted"] / total["passes"]
    return {name: float(value) for name, value in values.items()}


def selection_score(metrics: Mapping[str, float], select_by: SelectBy) -> float:
    """Compute the score that selects the state to keep, from `head_quality` on the split `validation`.

    A higher score is better. For `acceptance`, the score is the expected number of tokens per forward pass.
    For `head_1` and `later_heads`, the score is the negated mean cross-entropy of head 1 or of those heads
    2..K that have targets. The score is NaN if no target counts for it, or if one of these losses is NaN.
    """
    if select_by == "acceptance":
        return metrics.get("validation_acceptance_length", math.nan)
    # The accuracy of a head without targets is NaN. A head with targets counts even if its loss is NaN.
    losses = [
        loss
        for name, loss in metrics.items()
        if name.startswith("validation_ce_head_")
        and (name == "validation_ce_head_1") == (select_by == "head_1")
        and not math.isnan(metrics.get(name.replace("_ce_", "_accuracy_"), 0.0))
    ]
    return -sum(losses) / len(losses) if losses else math.nan


def per_head(name: str, values: Iterable[Tensor], *, first: int = 1) -> dict[str, Tensor]:
    """Return values of the heads `first`, `first` + 1, ... as metrics `<name>_head_<k>`."""
    return {f"{name}_head_{k}": value for k, value in enumerate(values, start=first)}
