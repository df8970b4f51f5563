"""Weights by entropy: 1 for the targets where the policy's prediction has the largest entropy, otherwise 0.

The method comes from Wang et al. 2025, "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective
Reinforcement Learning for LLM Reasoning" (https://arxiv.org/abs/2506.01939). In the paper, training only on
the 20 % of tokens with the largest entropy gives at least the accuracy of training on all tokens, because
these tokens decide how a text continues. The paper uses reinforcement learning; here each head imitates the
high-entropy tokens.

Shape letters: B batch rows, T positions, K heads, N source positions of the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights

if TYPE_CHECKING:
    from weighted_mtp_dft import EntropyOptions


class Entropy(WeightingStrategy):
    """Selects for each head the targets of the batch with the largest entropy of the head's prediction."""

    def __init__(self, options: EntropyOptions) -> None:
        self._keep = options.keep

    def weigh(self, view: StepView) -> Weights:
        """Return weights, float32 `[B, T, K]`: 1 for selected targets, otherwise 0.

        Each head has a threshold, the entropy that the share `keep` of its targets (rounded, at least one
        target) reaches. All targets with an entropy equal to the threshold are selected.
        """
        assert view.token_entropy_BTK is not None
        target_BTK, entropy_BTK = view.target_BTK, view.token_entropy_BTK
        kept_K = (self._keep * target_BTK.sum(dim=(0, 1))).round().clamp(min=1).long()
        ranked_NK = (
            entropy_BTK.where(target_BTK, -torch.inf).flatten(0, 1).sort(dim=0, descending=True).values
        )
        threshold_K = ranked_NK.gather(0, kept_K[None] - 1)[0]
        kept_BTK = (entropy_BTK >= threshold_K) & target_BTK
        count = target_BTK.sum().clamp(min=1)
        return Weights(
            weight=kept_BTK.float(),
            metrics={
                "entropy_mean": entropy_BTK.where(target_BTK, 0.0).sum() / count,
                "entropy_kept_mean": entropy_BTK.where(kept_BTK, 0.0).sum() / kept_BTK.sum().clamp(min=1),
            },
        )
