"""One batch of rows being decoded: caches, what may be looked at, and one step after the other.

A step sends each row's newest token and its drafts through the policy. Slots of drafts that did not stay
remain in the caches and are never looked at again, so rows of one batch may be of any length.

Shape letters: R rows, T tokens of a block, S slots of the caches, D drafted tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define, field
from torch import Tensor

from weighted_mtp_core.generation.draft_heads import AllHeads, Block
from weighted_mtp_core.generation.sampling import accept, accept_greedy, draw, probabilities
from weighted_mtp_core.model.families import READS_MASK
from weighted_mtp_core.model.policy import PolicyCache


@define(kw_only=True, eq=False)
class Decoder:
    """Decodes the rows of one batch together.

    Attributes:
        heads: Of a policy in evaluation mode; where none of them drafts, decoding is plain.
        temperature: 0 is greedy.
        generators: One source of uniform numbers a row.
    """

    heads: AllHeads
    temperature: float
    generators: list[torch.Generator]
    _cache: PolicyCache = field(init=False)
    _seen_RS: Tensor = field(init=False)
    _position_R: Tensor = field(init=False)
    _newest_R: Tensor = field(init=False)
    _block_RT: Tensor = field(init=False)
    _draft_RDV: Tensor | None = field(init=False, default=None)
    _undrafted: tuple[Block, Tensor] | None = field(init=False, default=None)
    _slot_T: Tensor = field(init=False)
    _later_TT: Tensor = field(init=False)

    def start(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Read the prompts, padded on the left; return each row's first token."""
        device = self.heads.policy.unembedding.weight.device
        width = max(map(len, prompts))
        ids_RT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
        length_R = torch.tensor([len(ids) for ids in prompts], device=device)
        block = self.heads.drafts + 1
        self._slot_T = torch.arange(block, device=device)
        self._later_TT = torch.full((block, block), -torch.inf, device=device).triu(diagonal=1)
        self._seen_RS = torch.arange(width, device=device) >= (width - length_R)[:, None]
        self._position_R = length_R
        self._cache = self.heads.new_caches()
        position_RT = (self._seen_RS.long().cumsum(dim=1) - 1).clamp(min=0)
        prompt = self._read(ids_RT, position_RT, self._seen_RS)
        last_R = torch.full_like(length_R, width - 1)
        newest_R1, _ = self._choose(prompt.first_at(last_R))
        self._newest_R = newest_R1[:, 0]
        self._undrafted = prompt, last_R
        return [[token] for token in self._newest_R.tolist()]

    def step(self) -> list[list[int]]:
        """Draft and verify the drafts; return the 1 to `drafts + 1` tokens that each row gained."""
        self._draft()
        position_RT = self._position_R[:, None] + self._slot_T
        block = self._read(self._block_RT, position_RT, self._seen_by_block())
        count_R, self._newest_R = self._verify(block.first())
        stays_RT = self._slot_T <= count_R[:, None]
        self._seen_RS = torch.cat([self._seen_RS, stays_RT], dim=1)
        self._position_R = self._position_R + count_R + 1
        self._undrafted = block, count_R
        # One tensor, so that the device is waited for once.
        found = torch.cat([count_R[:, None], self._newest_R[:, None], self._block_RT], dim=1).tolist()
        return [[*ids[1 : count + 1], token] for count, token, *ids in found]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._draft()  # first: what the heads draft from is that of all rows
        index = torch.tensor(rows, device=self._seen_RS.device)
        self.heads.keep(self._cache, index, rows=len(self.generators))
        self._seen_RS, self._position_R = self._seen_RS[index], self._position_R[index]
        self._block_RT = self._block_RT[index]
        self._draft_RDV = None if self._draft_RDV is None else self._draft_RDV[index]
        self.generators = [self.generators[row] for row in rows]

    def _read(self, ids_RT: Tensor, position_RT: Tensor, seen: Tensor) -> Block:
        return self.heads.read(ids_RT, position_RT=position_RT, cache=self._cache, seen=seen)

    def _seen_by_block(self) -> Tensor:
        """Return which slots the block's tokens may look at: those seen so far, and the block's up to theirs.

        With drafts, as what is added to scores, made once here; made of a mask by transformers and by torch
        it would be made anew in each layer. Windows have no say in that, but where one is left nothing is
        drafted. Models that read distances from the mask (ALiBi) need the mask.
        """
        rows, width = self._block_RT.shape
        if not self.heads.drafts or self.heads.policy.config.model_type in READS_MASK:
            new = torch.ones(rows, width, dtype=torch.bool, device=self._seen_RS.device)
            return torch.cat([self._seen_RS, new], dim=1)
        dtype = self.heads.policy.unembedding.weight.dtype
        before_RS = torch.zeros(self._seen_RS.shape, dtype=dtype, device=self._seen_RS.device)
        before_RS = before_RS.masked_fill_(~self._seen_RS, -torch.inf)
        before_R1TS = before_RS[:, None, None].expand(-1, -1, width, -1)
        return torch.cat([before_R1TS, self._later_TT.to(dtype).expand(rows, 1, -1, -1)], dim=-1)

    def _verify(self, state_RTH: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many drafts of each row head 1 keeps, and the token that it puts after them."""
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
        """Form the next block: the newest token, and what heads 2, 3, ... expect after it.

        Nothing if that is done. It waits until another step is sure to come: a batch's last drafts nothing.
        """
        if self._undrafted is None:
            return
        read, place_R = self._undrafted
        self._block_RT = self._newest_R[:, None]
        if self.heads.drafts:
            draft_RD, self._draft_RDV = self._choose(read.drafting(place_R))
            self._block_RT = torch.cat([self._block_RT, draft_RD], dim=1)
        self._undrafted = None

    def _choose(self, state_RTH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return tokens `[R, T]` of states, and the probabilities that they were drawn from."""
        logits_RTV = self.heads.policy.unembedding(state_RTH)
        if self.temperature == 0:
            return logits_RTV.argmax(dim=-1), None
        probability = probabilities(logits_RTV, temperature=self.temperature)
        return draw(probability, self._uniform(state_RTH.shape[1])), probability

    def _uniform(self, count: int) -> Tensor:
        """Return `count` uniform numbers a row, from each row's own stream."""
        drawn = [torch.rand(count, generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(self._seen_RS.device)
