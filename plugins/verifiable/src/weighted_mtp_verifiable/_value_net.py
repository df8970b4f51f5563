"""The network of the value head, which computes log-odds of success after every token.

A head that reads only the state is slow to learn how a program differs from its description: on 1,278
labelled programs, its AUC was 0.53 after 200 steps. So, unless `lm_loss_weight` is 0, the network also trains
a language-model head on correct responses (next-token cross-entropy) and uses each token's negative
log-likelihood (NLL) and two related numbers (`ValueNet._token_nll`). The log-odds of success after token t
are then

    logit V_t = value(state_t) + sum of log_odds_delta(state_s, NLL_s, ...) over response tokens s <= t,

because Bayes' rule adds log-odds token by token. With these log-odds, the AUC after 200 steps was at least
0.95.

Shape letters: B batch rows, T positions, H hidden, D width, V vocabulary, N targets, S token statistics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor, nn
from weighted_mtp_core.api import Batch

from weighted_mtp_verifiable._reductions import document_cumsum
from weighted_mtp_verifiable._transformer import AttentionContext, Layer

if TYPE_CHECKING:
    from weighted_mtp_verifiable import ValueHeadOptions

_TOKEN_STATISTICS = 3
_EMBEDDING_STD = 0.02


@frozen(kw_only=True, eq=False)
class ValueNetOutput:
    """The network's output for a batch.

    Attributes:
        logit_BT: Log-odds after each token that the response is correct.
        token_nll_BT: Negative log-likelihood, under the language-model head, of each response token that
            follows another token, in nats, with gradient; 0 for other tokens, and for all tokens if there is
            no language-model head.
    """

    logit_BT: Tensor
    token_nll_BT: Tensor


class ValueNet(nn.Module):
    """Maps token ids, or the states of another model, to log-odds of success.

    Args:
        options: Options of the critic, such as the width and the number of layers.
        vocab_size: Size of the vocabulary.
        state_size: Size of the states that are the input; None if the input is token ids.
    """

    def __init__(self, options: ValueHeadOptions, *, vocab_size: int, state_size: int | None) -> None:
        super().__init__()
        width = options.hidden_size
        self.head_size = width // options.heads
        self.input: nn.Module
        if state_size is None:
            self.input = nn.Embedding(vocab_size, width)
            nn.init.normal_(self.input.weight, std=_EMBEDDING_STD)
        else:
            self.input = nn.Sequential(nn.RMSNorm(state_size), nn.Linear(state_size, width))
        self.layers = nn.ModuleList(Layer(width=width, heads=options.heads) for _ in range(options.layers))
        self.norm = nn.RMSNorm(width)
        self.value = _mlp(width, width)
        has_lm_head = options.lm_loss_weight > 0
        self.lm_head = nn.Linear(width, vocab_size, bias=False) if has_lm_head else None
        self.log_odds_delta = _mlp(width + _TOKEN_STATISTICS, width) if has_lm_head else None

    def forward(self, inputs: Tensor, batch: Batch) -> ValueNetOutput:
        """Return the output for `inputs`, which are token ids `[B, T]` or states `[B, T, H]`."""
        x_BTD = self.input(inputs).float()
        context = AttentionContext.of_documents(batch.document_BT, head_size=self.head_size)
        for layer in self.layers:
            x_BTD = layer(x_BTD, context)
        state_BTD = self.norm(x_BTD)
        logit_BT = _in_float32(self.value, state_BTD)
        zero_BT = torch.zeros_like(logit_BT)
        if self.lm_head is None or self.log_odds_delta is None:
            return ValueNetOutput(logit_BT=logit_BT, token_nll_BT=zero_BT)
        at = batch.target_positions()
        token_nll_N, statistics_NS = self._token_nll(state_BTD, batch.ids_BT, at=at)
        delta_N = _in_float32(self.log_odds_delta, torch.cat([state_BTD[at], statistics_NS], dim=-1))
        delta_BT = zero_BT.index_put(at, delta_N)
        return ValueNetOutput(
            logit_BT=logit_BT + document_cumsum(delta_BT, batch.document_BT),
            token_nll_BT=zero_BT.index_put(at, token_nll_N),
        )

    def _token_nll(
        self, state_BTD: Tensor, ids_BT: Tensor, *, at: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return negative log-likelihoods `[N]` of the tokens at `at`, and detached statistics `[N, S]`.

        The statistics are the token's log-probability, its difference from the largest log-probability of any
        token, and the entropy of the prediction. The entropy is included because an unlikely token need not
        be a mistake if many tokens are plausible.
        """
        assert self.lm_head is not None
        row_N, column_N = at
        log_p_NV = torch.log_softmax(self.lm_head(state_BTD[row_N, column_N - 1]).float(), dim=-1)
        token_log_p_N = log_p_NV.gather(1, ids_BT[at][:, None]).squeeze(1)
        with torch.no_grad():
            entropy_N = -(log_p_NV.exp() * log_p_NV).sum(dim=-1)
            gap_N = token_log_p_N - log_p_NV.amax(dim=-1)
            statistics_NS = torch.stack([token_log_p_N, gap_N, entropy_N], dim=-1)
        return -token_log_p_N, statistics_NS.detach()


def _in_float32(mlp: nn.Module, input_ND: Tensor) -> Tensor:
    """Return the output `[N]` of an MLP for inputs `[N, D]`, computed in float32.

    With log-odds in bfloat16, the rounding steps of a value would be as large as 0.0016, which is about as
    much as one token changes the value.
    """
    with torch.autocast(input_ND.device.type, enabled=False):
        output_N: Tensor = mlp(input_ND).squeeze(-1)
    return output_N


def _mlp(inputs: int, width: int) -> nn.Sequential:
    """Return an MLP with one output, which is 0 before training, so that every value starts at 1/2."""
    last = nn.Linear(width, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), last)
