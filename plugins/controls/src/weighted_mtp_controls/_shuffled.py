"""The control that keeps an arm's weights and gives them to other tokens of the same response.

Shape letters: B batch rows, T positions, C columns: K heads, or 1 for weights by token.
"""

from __future__ import annotations

from torch import Tensor
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights

from weighted_mtp_controls._random_numbers import whole
from weighted_mtp_controls._wrapper import Wrapper, counted


class Shuffled(Wrapper):
    """Permutes the weights over the response tokens of each document: the same multiset, so the same sum.

    Weights `[B, T, K]` are permuted over each head's own targets of the document.
    """

    def __init__(self, arm: WeightingStrategy, *, seed: int) -> None:
        super().__init__([arm])
        self._seed = seed

    def weigh(self, view: StepView) -> Weights:
        """Return the arm's weights, shuffled, with the arm's metrics."""
        weights = self._parts[0].weigh(view)
        weight_BTC = weights.weight.view(*view.ids_BT.shape, -1)
        counted_BTC = counted(view, weights.weight).view(weight_BTC.shape)
        key_BTC = whole(view, seed=self._seed, heads=weight_BTC.shape[-1])
        shuffled_BTC = _permute(weight_BTC, key_BTC, document_BT=view.document_BT, counted_BTC=counted_BTC)
        return Weights(weight=shuffled_BTC.view(weights.weight.shape), metrics=weights.metrics)


def _permute(x_BTC: Tensor, key_BTC: Tensor, *, document_BT: Tensor, counted_BTC: Tensor) -> Tensor:
    """Permute within the counted entries of each document and column, in the order of the keys."""
    # What does not count goes behind all documents, and is put back where it was.
    group_BTC = document_BT[..., None].where(counted_BTC, x_BTC.shape[1])
    in_place_BTC = group_BTC.argsort(dim=1, stable=True)
    by_key_BTC = key_BTC.where(counted_BTC, 0).argsort(dim=1, stable=True)
    in_groups_BTC = group_BTC.gather(1, by_key_BTC).argsort(dim=1, stable=True)
    drawn_BTC = by_key_BTC.gather(1, in_groups_BTC)
    return x_BTC.scatter(1, in_place_BTC, x_BTC.gather(1, drawn_BTC))
