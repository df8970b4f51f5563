"""Shuffled control: the weights of another weighting, moved to other tokens of the same response.

Shape letters: B batch rows, T positions, C columns (the K heads, or 1 for weights by token).
"""

from __future__ import annotations

from torch import Tensor
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights

from weighted_mtp_controls._random_numbers import random_integers
from weighted_mtp_controls._wrapper import Wrapper, target_mask


class Shuffled(Wrapper):
    """Permutes the wrapped weights within each document, so that the sum over the document is unchanged.

    Weights `[B, T]` are permuted over the response tokens of a document. Weights `[B, T, K]` are permuted for
    each head separately, over the document's pairs that count.
    """

    def __init__(self, of: WeightingStrategy, *, seed: int) -> None:
        super().__init__([of])
        self._seed = seed

    def weigh(self, view: StepView) -> Weights:
        """Return the shuffled weights and the metrics of the wrapped weighting."""
        weights = self._wrapped[0].weigh(view)
        weight_BTC = weights.weight.view(*view.ids_BT.shape, -1)
        target_BTC = target_mask(view, weights.weight).view(weight_BTC.shape)
        key_BTC = random_integers(view, seed=self._seed, heads=weight_BTC.shape[-1])
        shuffled_BTC = _permute(weight_BTC, key_BTC, document_BT=view.document_BT, target_BTC=target_BTC)
        return Weights(weight=shuffled_BTC.view(weights.weight.shape), metrics=weights.metrics)


def _permute(x_BTC: Tensor, key_BTC: Tensor, *, document_BT: Tensor, target_BTC: Tensor) -> Tensor:
    """Permute x over the targets of each document and column, in the order of the random keys."""
    # Entries that are not targets form an extra group after all documents and keep their positions.
    group_BTC = document_BT[..., None].where(target_BTC, x_BTC.shape[1])
    old_order_BTC = group_BTC.argsort(dim=1, stable=True)
    by_key_BTC = key_BTC.where(target_BTC, 0).argsort(dim=1, stable=True)
    group_order_BTC = group_BTC.gather(1, by_key_BTC).argsort(dim=1, stable=True)
    new_order_BTC = by_key_BTC.gather(1, group_order_BTC)
    return x_BTC.scatter(1, old_order_BTC, x_BTC.gather(1, new_order_BTC))
