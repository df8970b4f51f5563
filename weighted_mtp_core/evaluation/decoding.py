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

from weighted_mtp_core.evaluation.sampling import accept, draw, probabilities
from weighted_mtp_core.model.policy import Policy, PolicyCache


@define(kw_only=True, eq=False)
class Decoder:
    """Decodes the rows of one batch together.

    Attributes:
        policy: In evaluation mode.
        drafts: Tokens that heads 2, 3, ... draft for each step; 0 is plain decoding.
        temperature: 0 is greedy.
        generators: One source of uniform numbers a row.
    """

    policy: Policy
    drafts: int
    temperature: float
    generators: list[torch.Generator]
    _cache: PolicyCache = field(init=False)
    _seen_RS: Tensor = field(init=False)
    _position_R: Tensor = field(init=False)
    _block_RT: Tensor = field(init=False)
    _draft_RDV: Tensor = field(init=False)

    def start(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Read the prompts, padded on the left; return each row's first token."""
        device = self.policy.unembedding.weight.device
        width = max(map(len, prompts))
        ids_RT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
        length_R = torch.tensor([len(ids) for ids in prompts], device=device)
        self._seen_RS = torch.arange(width, device=device) >= (width - length_R)[:, None]
        self._position_R = length_R
        self._cache = self.policy.new_caches()
        position_RT = (self._seen_RS.long().cumsum(dim=1) - 1).clamp(min=0)
        hidden_RTH = self._trunk(ids_RT, position_RT)
        uniform = self._uniform(self.drafts + 1)
        state_RTH = self._head(1, hidden_RTH, position_RT)[:, -1:]
        first_RV = self._probabilities(state_RTH)[:, 0]
        token_R = draw(first_RV, uniform[:, 0])
        last_R = torch.full_like(length_R, width - 1)
        self._draft(token_R, hidden_RTH, position_RT, at_R=last_R, uniform_RD=uniform[:, 1:])
        return [[token] for token in token_R.tolist()]

    def step(self) -> list[list[int]]:
        """Verify the drafts and draft anew; return the 1 to `drafts + 1` tokens that each row gained."""
        rows, width = self._block_RT.shape
        grown = torch.ones(rows, width, dtype=torch.bool, device=self._seen_RS.device)
        self._seen_RS = torch.cat([self._seen_RS, grown], dim=1)
        slot_T = torch.arange(width, device=self._seen_RS.device)
        position_RT = self._position_R[:, None] + slot_T
        hidden_RTH = self._trunk(self._block_RT, position_RT)
        target_RTV = self._probabilities(self._head(1, hidden_RTH, position_RT))
        uniform = self._uniform(2 * self.drafts + 1)
        count_R, next_RV = accept(
            self._block_RT[:, 1:], self._draft_RDV, target_RTV, uniform[:, : self.drafts]
        )
        token_R = draw(next_RV, uniform[:, self.drafts])
        stays_RT = slot_T <= count_R[:, None]
        self._seen_RS[:, -width:] = stays_RT
        self._position_R = self._position_R + count_R + 1
        kept = [
            [*block[1 : count + 1], token]
            for block, count, token in zip(
                self._block_RT.tolist(), count_R.tolist(), token_R.tolist(), strict=True
            )
        ]
        self._draft(token_R, hidden_RTH, position_RT, at_R=count_R, uniform_RD=uniform[:, self.drafts + 1 :])
        return kept

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(rows, device=self._seen_RS.device)
        for cache in (self._cache.trunk, *self._cache.heads):
            cache.batch_select_indices(index)
        self._seen_RS, self._position_R = self._seen_RS[index], self._position_R[index]
        self._block_RT, self._draft_RDV = self._block_RT[index], self._draft_RDV[index]
        self.generators = [self.generators[row] for row in rows]

    def _draft(
        self, token_R: Tensor, hidden_RTH: Tensor, position_RT: Tensor, *, at_R: Tensor, uniform_RD: Tensor
    ) -> None:
        """Form the next block: the newest token, and what heads 2, 3, ... expect after it.

        Every head reads the whole block, so that its cache has no gaps; only the states at `at_R` draft.
        """
        row_R = torch.arange(len(token_R), device=token_R.device)
        tokens, sources = [token_R], []
        for k in range(2, self.drafts + 2):
            state_RTH = self._head(k, hidden_RTH, position_RT)[row_R, at_R][:, None]
            source_RV = self._probabilities(state_RTH)[:, 0]
            tokens.append(draw(source_RV, uniform_RD[:, k - 2]))
            sources.append(source_RV)
        self._block_RT = torch.stack(tokens, dim=1)
        vocabulary = self.policy.vocab_size
        self._draft_RDV = (
            torch.stack(sources, dim=1)
            if sources
            else torch.zeros(len(token_R), 0, vocabulary, device=token_R.device)
        )

    def _trunk(self, ids_RT: Tensor, position_RT: Tensor) -> Tensor:
        return self.policy.trunk_states(
            ids_RT, position_BT=position_RT, cache=self._cache.trunk, seen_BS=self._seen_RS
        )

    def _head(self, k: int, hidden_RTH: Tensor, position_RT: Tensor) -> Tensor:
        cache = self._cache.heads[k - 1] if self._cache.heads else None
        return self.policy.head_states(
            k, hidden_RTH, position_BT=position_RT, cache=cache, seen_BS=self._seen_RS
        )

    def _probabilities(self, state_RTH: Tensor) -> Tensor:
        return probabilities(self.policy.unembedding(state_RTH), temperature=self.temperature)

    def _uniform(self, count: int) -> Tensor:
        """Return `count` uniform numbers a row, from each row's own stream; greedy decoding reads none."""
        device = self._seen_RS.device
        if self.temperature == 0:
            return torch.zeros(len(self._seen_RS), count, device=device)
        drawn = [torch.rand(count, generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(device)
