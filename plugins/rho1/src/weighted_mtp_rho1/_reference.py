"""The critic `rho1.reference`: next-token losses of a frozen reference model.

Shape letters: B batch rows, T positions, H hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from weighted_mtp_core.api import Batch, BuildContext, Critic, Scores

if TYPE_CHECKING:
    from weighted_mtp_rho1 import ReferenceOptions


class Reference(Critic):
    """Computes the losses of a frozen model: `options.checkpoint`, or the policy before training."""

    reads_policy = False
    cacheable = True

    def __init__(self, options: ReferenceOptions, context: BuildContext) -> None:
        checkpoint = None if options.checkpoint is None else Path(options.checkpoint)
        self._losses = context.model.frozen_losses(checkpoint)

    def score(self, batch: Batch, hidden_BTH: Tensor | None) -> Scores:
        """Return the reference losses of response tokens in nats, float32 `[B, T]`; 0 for other tokens.

        A response token without a preceding token also has the loss 0.
        """
        del hidden_BTH
        return Scores(reference_loss_BT=self._losses(batch))
