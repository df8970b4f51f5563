"""One batch of rows being decoded: caches, what may be looked at, and one step after the other.

A step sends each row's newest token and its drafts through the policy. Slots of drafts that did not stay
remain in the caches and are never looked at again, so rows of one batch may be of any length.

Shape letters: R rows, T tokens of a block, S slots of the caches, D drafted tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from attrs import define, field
from torch import Tensor

from weighted_mtp_core.evaluation.all_heads import head_states_of
from weighted_mtp_core.evaluation.sampling import accept, accept_greedy, draw, probabilities
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
    _newest_R: Tensor = field(init=False)
    _block_RT: Tensor = field(init=False)
    _draft_RDV: Tensor | None = field(init=False, default=None)
    _draft_states: Callable[[], Tensor] | None = field(init=False, default=None)

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
        state_RTH, others = self._states(ids_RT, position_RT)
        self._newest_R, _ = self._choose(state_RTH[:, -1], self._uniform(1)[:, 0])
        self._draft_states = partial(_at, torch.full_like(length_R, width - 1), others)
        return [[token] for token in self._newest_R.tolist()]

    def step(self) -> list[list[int]]:
        """Draft and verify the drafts; return the 1 to `drafts + 1` tokens that each row gained."""
        self._draft()
        rows, width = self._block_RT.shape
        grown = torch.ones(rows, width, dtype=torch.bool, device=self._seen_RS.device)
        before_RS = self._seen_RS
        self._seen_RS = torch.cat([before_RS, grown], dim=1)
        slot_T = torch.arange(width, device=self._seen_RS.device)
        state_RTH, others = self._states(self._block_RT, self._position_R[:, None] + slot_T)
        count_R, self._newest_R = self._verify(state_RTH, self._uniform(self.drafts + 1))
        # Not in place: the drafting heads have yet to look at what the block could see.
        self._seen_RS = torch.cat([before_RS, slot_T <= count_R[:, None]], dim=1)
        self._position_R = self._position_R + count_R + 1
        self._draft_states = partial(_at, count_R, others)
        return [
            [*block[1 : count + 1], token]
            for block, count, token in zip(
                self._block_RT.tolist(), count_R.tolist(), self._newest_R.tolist(), strict=True
            )
        ]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._draft()  # first: what the heads draft from is that of all rows
        index = torch.tensor(rows, device=self._seen_RS.device)
        for cache in (self._cache.trunk, *self._cache.heads):
            cache.batch_select_indices(index)
        self._seen_RS, self._position_R = self._seen_RS[index], self._position_R[index]
        self._block_RT = self._block_RT[index]
        self._draft_RDV = None if self._draft_RDV is None else self._draft_RDV[index]
        self.generators = [self.generators[row] for row in rows]

    def _states(self, ids_RT: Tensor, position_RT: Tensor) -> tuple[Tensor, list[Callable[[], Tensor]]]:
        """Return what head 1 hands to the unembedding, `[R, T, H]`, and what gives that of drafting heads."""
        first, *others = head_states_of(
            self.policy, ids_RT, position_RT=position_RT, cache=self._cache, seen_RS=self._seen_RS
        )
        return first(), others[: self.drafts]

    def _verify(self, state_RTH: Tensor, uniform_RT: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many drafts of each row head 1 keeps, and the token that it puts after them."""
        if not self.drafts:
            token_R, _ = self._choose(state_RTH[:, -1], uniform_RT[:, 0])
            return torch.zeros_like(token_R), token_R
        logits_RTV = self.policy.unembedding(state_RTH)
        draft_RD = self._block_RT[:, 1:]
        if self._draft_RDV is None:
            return accept_greedy(draft_RD, logits_RTV.argmax(dim=-1))
        target_RTV = probabilities(logits_RTV, temperature=self.temperature)
        count_R, next_RV = accept(draft_RD, self._draft_RDV, target_RTV, uniform_RT[:, :-1])
        return count_R, draw(next_RV, uniform_RT[:, -1])

    def _draft(self) -> None:
        """Form the next block: the newest token, and what heads 2, 3, ... expect after it.

        Nothing if that is done. It waits until another step is sure to come: a batch's last drafts nothing.
        """
        if self._draft_states is None:
            return
        self._block_RT = self._newest_R[:, None]
        if self.drafts:
            uniform_RD = self._uniform(self.drafts)
            draft_RD, self._draft_RDV = self._choose(self._draft_states(), uniform_RD)
            self._block_RT = torch.cat([self._block_RT, draft_RD], dim=1)
        self._draft_states = None

    def _choose(self, state: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return tokens `[...]` of states `[..., H]`, and the probabilities that they were drawn from."""
        logits = self.policy.unembedding(state)
        if self.temperature == 0:
            return logits.argmax(dim=-1), None
        probability = probabilities(logits, temperature=self.temperature)
        return draw(probability, uniform), probability

    def _uniform(self, count: int) -> Tensor:
        """Return `count` uniform numbers a row, from each row's own stream; greedy decoding reads none."""
        device = self._seen_RS.device
        if self.temperature == 0:
            return torch.zeros(len(self._seen_RS), count, device=device)
        drawn = [torch.rand(count, generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(device)


def _at(place_R: Tensor, others: Sequence[Callable[[], Tensor]]) -> Tensor:
    """Return what the drafting heads hand to the unembedding at one place of each row, `[R, D, H]`."""
    row_R = torch.arange(len(place_R), device=place_R.device)
    return torch.stack([states()[row_R, place_R] for states in others], dim=1)
