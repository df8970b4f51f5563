"""The network of the value head: states, a value read off each, and evidence summed along the response.

A head on the state alone learns to compare a program with its description slowly: on 1,280 labelled programs
200 steps left it at AUC 0.53. So the network also learns to *write* correct responses (next-token
cross-entropy), and reads from each token how much it surprised that writer. The log-odds of success are

    logit V_t = head(state_t) + sum of evidence(state_s, surprise_s) over response tokens s <= t,

as Bayes' rule adds up log-odds token by token. The same 200 steps then reach AUC 0.95.

Shape letters: B batch rows, T positions, D width, V vocabulary, N predicted tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor, nn
from weighted_mtp_core.api import Batch

from weighted_mtp_verifiable._advantage import same_as_previous
from weighted_mtp_verifiable._transformer import Layer, Sight

if TYPE_CHECKING:
    from weighted_mtp_verifiable import ValueHeadOptions

_SURPRISES = 3
_EMBEDDING_STD = 0.02


@frozen(kw_only=True, eq=False)
class Judgement:
    """What the network says of a batch.

    Attributes:
        logit_BT: Log-odds, at each token, that the response ends right.
        surprise_BT: Cross-entropy of each response token for the writer of correct responses, with gradient;
            0 elsewhere, and everywhere without a writer.
    """

    logit_BT: Tensor
    surprise_BT: Tensor


class ValueNet(nn.Module):
    """Token ids or another model's states in, judgements out.

    Args:
        options: Width, layers, and whether there is a writer.
        vocab_size: V.
        state_size: Width of the states that go in; None for token ids.
    """

    def __init__(self, options: ValueHeadOptions, *, vocab_size: int, state_size: int | None) -> None:
        super().__init__()
        width = options.hidden_size
        self.head_size = width // options.heads
        self.entrance: nn.Module
        if state_size is None:
            self.entrance = nn.Embedding(vocab_size, width)
            nn.init.normal_(self.entrance.weight, std=_EMBEDDING_STD)
        else:
            self.entrance = nn.Sequential(nn.RMSNorm(state_size), nn.Linear(state_size, width))
        self.layers = nn.ModuleList(Layer(width=width, heads=options.heads) for _ in range(options.layers))
        self.norm = nn.RMSNorm(width)
        self.value = _mlp(width, width)
        self.writer = nn.Linear(width, vocab_size, bias=False) if options.writing > 0 else None
        self.evidence = _mlp(width + _SURPRISES, width) if options.writing > 0 else None

    def forward(self, source: Tensor, batch: Batch) -> Judgement:
        """Judge a batch; `source` holds token ids `[B, T]` or states `[B, T, H]`."""
        x_BTD = self.entrance(source)
        sight = Sight.of(batch.document_BT, size=self.head_size)
        for layer in self.layers:
            x_BTD = layer(x_BTD, sight)
        state_BTD = self.norm(x_BTD)
        logit_BT = self.value(state_BTD).squeeze(-1)
        if self.writer is None or self.evidence is None:
            return Judgement(logit_BT=logit_BT, surprise_BT=torch.zeros_like(logit_BT))
        at = batch.target_positions()
        surprise_N, described_NS = self._surprise(state_BTD, batch.ids_BT, at=at)
        evidence_N = self.evidence(torch.cat([state_BTD[at], described_NS], dim=-1)).squeeze(-1)
        nothing_BT = torch.zeros_like(logit_BT)
        evidence_BT = nothing_BT.index_put(at, evidence_N)
        return Judgement(
            logit_BT=logit_BT + sums_so_far(evidence_BT, batch.document_BT),
            surprise_BT=nothing_BT.index_put(at, surprise_N),
        )

    def _surprise(
        self, state_BTD: Tensor, ids_BT: Tensor, *, at: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Return cross-entropies `[N]` of the tokens at `at`, and what is told of them, detached, `[N, 3]`.

        Told are the token's log-probability, by how much another token was likelier, and the entropy: a rare
        token where many would do is no mistake.
        """
        assert self.writer is not None
        row_N, column_N = at
        log_p_NV = torch.log_softmax(self.writer(state_BTD[row_N, column_N - 1]), dim=-1)
        own_N = log_p_NV.gather(1, ids_BT[at][:, None]).squeeze(1)
        with torch.no_grad():
            entropy_N = -(log_p_NV.exp() * log_p_NV).sum(dim=-1)
            described_NS = torch.stack([own_N, own_N - log_p_NV.amax(dim=-1), entropy_N], dim=-1)
        return -own_N, described_NS.detach()


def sums_so_far(x_BT: Tensor, document_BT: Tensor) -> Tensor:
    """Return for each token the sum over its document up to and with it."""
    total_BT = x_BT.cumsum(dim=1)
    index_T = torch.arange(x_BT.shape[1], device=x_BT.device)
    start_BT = (~same_as_previous(document_BT) * index_T).cummax(dim=1).values
    return total_BT - (total_BT - x_BT).gather(1, start_BT)


def _mlp(inputs: int, width: int) -> nn.Sequential:
    """Return a network with one output that starts at 0: every value then starts at 1/2."""
    last = nn.Linear(width, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), last)
