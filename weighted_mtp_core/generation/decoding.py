"""Decode the rows of one batch step by step, with caches, an attention mask, drafts and their verification.

Each step runs the policy on each row's newest token and drafts. The cache slots of rejected drafts are kept
but masked from then on, so the rows of a batch can grow at different speeds.

Shape letters: R rows, T tokens of a block, S slots of the caches, D drafted tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define, field
from torch import Tensor

from weighted_mtp_core.generation.chained_drafts import ChainedDrafts
from weighted_mtp_core.generation.draft_heads import Block, DecodingHeads
from weighted_mtp_core.generation.sampling import accept, accept_greedy, draw, probabilities
from weighted_mtp_core.model.families import READS_MASK
from weighted_mtp_core.model.policy import PolicyCache


@define(kw_only=True, eq=False)
class Decoder:
    """Decodes the rows of one batch together.

    Attributes:
        heads: Heads of a policy in evaluation mode; if `heads.drafts` is 0, decoding is plain.
        temperature: Sampling temperature; 0 is greedy decoding.
        generators: One random generator per row.
    """

    heads: DecodingHeads
    temperature: float
    generators: list[torch.Generator]
    _cache: PolicyCache = field(init=False)
    _seen_RS: Tensor = field(init=False)
    _position_R: Tensor = field(init=False)
    _newest_R: Tensor = field(init=False)
    _block_RT: Tensor = field(init=False)
    _draft_RDV: Tensor | None = field(init=False, default=None)
    _draft_from: tuple[Block, Tensor] | None = field(init=False, default=None)
    _chain: ChainedDrafts | None = field(init=False, default=None)
    _slot_T: Tensor = field(init=False)
    _future_TT: Tensor = field(init=False)

    def start(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Run the policy on the prompts, padded on the left; return the first new token of each row."""
        device = self.heads.policy.unembedding.weight.device
        width = max(map(len, prompts))
        ids_RT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
        length_R = torch.tensor([len(ids) for ids in prompts], device=device)
        block = self.heads.drafts + 1
        self._slot_T = torch.arange(block, device=device)
        self._future_TT = torch.full((block, block), -torch.inf, device=device).triu(diagonal=1)
        self._seen_RS = torch.arange(width, device=device) >= (width - length_R)[:, None]
        self._position_R = length_R
        self._cache = self.heads.new_caches()
        if self.heads.drafts and self.heads.policy.heads.chained:
            self._chain = ChainedDrafts(policy=self.heads.policy, drafts=self.heads.drafts)
        self._block_RT = ids_RT
        position_RT = (self._seen_RS.long().cumsum(dim=1) - 1).clamp(min=0)
        prompt = self._read(ids_RT, position_RT, self._seen_RS)
        last_R = torch.full_like(length_R, width - 1)
        newest_R1, _ = self._choose(prompt.head_1_at(last_R))
        self._newest_R = newest_R1[:, 0]
        self._draft_from = prompt, last_R
        return [[token] for token in self._newest_R.tolist()]

    def step(self) -> list[list[int]]:
        """Draft and verify tokens; return the 1 to `drafts + 1` new tokens of each row."""
        self._draft()
        position_RT = self._position_R[:, None] + self._slot_T
        block = self._read(self._block_RT, position_RT, self._block_mask())
        count_R, self._newest_R = self._verify(block.head_1())
        self._seen_RS = torch.cat([self._seen_RS, self._slot_T <= count_R[:, None]], dim=1)
        self._position_R = self._position_R + count_R + 1
        self._draft_from = block, count_R
        # One tensor, so that the host synchronises with the device only once.
        rows = torch.cat([count_R[:, None], self._newest_R[:, None], self._block_RT], dim=1).tolist()
        return [[*ids[1 : count + 1], token] for count, token, *ids in rows]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows except the rows with the indices `rows`."""
        self._draft()  # before rows are dropped, because the stored states belong to all rows
        index = torch.tensor(rows, device=self._seen_RS.device)
        self.heads.keep(self._cache, index, rows=len(self.generators))
        if self._chain is not None:
            self._chain.keep(index)
        self._seen_RS, self._position_R = self._seen_RS[index], self._position_R[index]
        self._block_RT = self._block_RT[index]
        self._draft_RDV = None if self._draft_RDV is None else self._draft_RDV[index]
        self.generators = [self.generators[row] for row in rows]

    def _read(self, ids_RT: Tensor, position_RT: Tensor, seen: Tensor) -> Block:
        return self.heads.read(ids_RT, position_RT=position_RT, cache=self._cache, seen=seen)

    def _block_mask(self) -> Tensor:
        """Return the attention mask: to which cache slots and tokens of the block each token may attend.

        With drafts, the mask is a float tensor that is added to attention scores, because transformers and
        torch would convert a boolean mask again in each layer. The float mask ignores sliding windows,
        because drafting is disabled if the text and its rejected drafts might not fit into a window. The
        families in `READS_MASK` need a boolean mask.
        """
        rows, width = self._block_RT.shape
        if not self.heads.drafts or self.heads.policy.config.model_type in READS_MASK:
            new = torch.ones(rows, width, dtype=torch.bool, device=self._seen_RS.device)
            return torch.cat([self._seen_RS, new], dim=1)
        dtype = self.heads.policy.unembedding.dtype
        past_RS = torch.zeros(self._seen_RS.shape, dtype=dtype, device=self._seen_RS.device)
        past_RS = past_RS.masked_fill_(~self._seen_RS, -torch.inf)
        past_R1TS = past_RS[:, None, None].expand(-1, -1, width, -1)
        return torch.cat([past_R1TS, self._future_TT.to(dtype).expand(rows, 1, -1, -1)], dim=-1)

    def _verify(self, state_RTH: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each row the number of drafts that head 1 accepts, and the token after these drafts."""
        if not self.heads.drafts:
            token_R1, _ = self._choose(state_RTH)
            return torch.zeros_like(token_R1[:, 0]), token_R1[:, 0]
        logits_RTV = self.heads.policy.unembedding(state_RTH)
        draft_RD = self._block_RT[:, 1:]
        if self._draft_RDV is None:
            return accept_greedy(draft_RD, logits_RTV.argmax(dim=-1))
        target_RTV = probabilities(logits_RTV, temperature=self.temperature)
        uniform_RT = self._uniform(self.heads.drafts + 1)
        count_R, next_RV = accept(draft_RD, self._draft_RDV, target_RTV, uniform_RT[:, :-1])
        return count_R, draw(next_RV, uniform_RT[:, -1])

    def _draft(self) -> None:
        """Form the next block: the newest token and the tokens that heads 2, 3, ... predict after it.

        If the next block exists already, this method does nothing. The method is called only when another
        step follows, so that nothing is drafted after the last step.
        """
        if self._draft_from is None:
            return
        block, last_R = self._draft_from
        newest_R1 = self._newest_R[:, None]
        if not self.heads.drafts:
            self._block_RT = newest_R1
        else:
            if self._chain is None:
                draft_RD, self._draft_RDV = self._choose(block.drafting_heads_at(last_R))
            else:
                draft_RD, self._draft_RDV = self._chain.draft(
                    self._block_RT,
                    block.hidden_RTH,
                    last_R=last_R,
                    newest_R=self._newest_R,
                    position_R=self._position_R,
                    cache=self._cache,
                    choose=self._choose,
                )
            self._block_RT = torch.cat([newest_R1, draft_RD], dim=1)
        self._draft_from = None

    def _choose(self, state_RTH: Tensor, first: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return a token for each state, `[R, T]`, and the distributions from which the tokens were drawn.

        With temperature 0, None is returned instead of distributions. For drafts, `first` is the index of the
        first draft, from 0.
        """
        del first
        logits_RTV = self.heads.policy.unembedding(state_RTH)
        if self.temperature == 0:
            return logits_RTV.argmax(dim=-1), None
        probability = probabilities(logits_RTV, temperature=self.temperature)
        return draw(probability, self._uniform(state_RTH.shape[1])), probability

    def _uniform(self, count: int) -> Tensor:
        """Return `count` uniform random numbers for each row, from the generator of the row."""
        drawn = [torch.rand(count, generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(self._seen_RS.device)
