"""A critic that predicts at every token whether the response will be verified as right.

Shape letters: B batch rows, T positions, H hidden, D width of the own layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from weighted_mtp_core.api import Batch, BuildContext, Critic, CriticLoss, Scores
from weighted_mtp_verifiable._transformer import CausalTransformer

if TYPE_CHECKING:
    from weighted_mtp_verifiable import ValueHeadOptions


class ValueHead(Critic):
    """First version."""

    trainable = True

    def __init__(self, options: ValueHeadOptions, context: BuildContext) -> None:
        model = context.model
        self._options = options
        self.batching: Literal["pointwise", "pairs"] = (
            "pairs" if options.objective == "bradley_terry" else "pointwise"
        )
        self.reads_policy = options.body == "policy"
        self._frozen = model.frozen_trunk() if options.body == "frozen" else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self._net = CausalTransformer(
                vocab_size=model.vocab_size if options.body == "own" else None,
                input_size=options.hidden_size if options.body == "own" else model.hidden_size,
                width=options.hidden_size,
                layers=options.layers,
                heads=options.heads,
            ).to(model.device)

    def _logits(self, batch: Batch, hidden_BTH: Tensor | None) -> Tensor:
        source = batch.ids_BT
        if self._options.body == "frozen" and self._frozen is not None:
            source = self._frozen(batch)
        elif self._options.body == "policy" and hidden_BTH is not None:
            source = hidden_BTH.detach()
        return self._net(source, batch.document_BT)

    @torch.no_grad()
    def score(self, batch: Batch, hidden_BTH: Tensor | None) -> Scores:
        """Return the probability that the response ends right, at each token."""
        return Scores(value_BT=torch.sigmoid(self._logits(batch, hidden_BTH).float()))

    def loss(self, batch: Batch, hidden_BTH: Tensor | None) -> CriticLoss:
        """Return the objective's loss."""
        logit_BT = self._logits(batch, hidden_BTH).float()
        before_BT = F.pad(batch.response_BT[:, 1:], (0, 1)) & (batch.document_BT >= 0)
        mask_BT = batch.response_BT | before_BT
        row_reward_B1 = batch.reward_BT.amax(dim=1, keepdim=True)
        bce_BT = F.binary_cross_entropy_with_logits(logit_BT, row_reward_B1.expand_as(logit_BT), reduction="none")
        return CriticLoss(loss=bce_BT[mask_BT].mean())

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return what stage 1 trains."""
        return self._net.parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights."""
        return dict(self._net.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the weights."""
        self._net.load_state_dict(state)
