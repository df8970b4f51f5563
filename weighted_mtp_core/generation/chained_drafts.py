"""Draft tokens one after the other with `sequential` heads, whose modules have key-value caches.

Sources are the positions of tokens that the trunk has read and head 1 has confirmed; the newest token is not
a source yet. At source t, module d, which belongs to head d + 1, reads the token x[t + d]. For the newest
sources, x[t + d] is a draft, so the keys and values of these sources are valid for one step only. In each
step, module d reads the new sources. Unless the modules are recurrent (`Wiring.recurrent`), module d also
reads the last d - 1 earlier sources again, because their tokens x[t + d] are confirmed by now.

Rows are aligned on the right, at their last source. Cache slots of earlier drafts are kept but masked.

Shape letters: R rows, T tokens of a block, C columns (sources), S slots of a cache, D drafts, H hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from weighted_mtp_core.model.heads.sequential import SequentialHeads
from weighted_mtp_core.model.policy import Policy, PolicyCache

Choose = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]
"""A function that chooses tokens from states `[R, 1, H]`; its second argument is the draft's index, from 0.

It returns the tokens and the distributions from which they were drawn; None instead of distributions for
greedy decoding.
"""


@define(kw_only=True, eq=False)
class ChainedDrafts:
    """Drafts tokens for the rows of one batch.

    Attributes:
        policy: A policy with `sequential` heads.
        drafts: D, the number of tokens to draft in each step.
    """

    policy: Policy
    drafts: int
    # For each cache, bool [R, S], True for slots that may be attended to.
    _seen: list[Tensor] = field(init=False, factory=list)
    # For each module, the state [R, 1, H] that the following module reads again in the next step.
    _carried: list[Tensor] = field(init=False, factory=list)

    def draft(
        self,
        ids_RT: Tensor,
        hidden_RTH: Tensor,
        *,
        last_R: Tensor,
        newest_R: Tensor,
        position_R: Tensor,
        cache: PolicyCache,
        choose: Choose,
    ) -> tuple[Tensor, Tensor | None]:
        """Draft the tokens after the newest token.

        Args:
            ids_RT: The tokens that the trunk has read in this step; in the first step, these are the prompts,
                padded on the left.
            hidden_RTH: The trunk's states of the tokens `ids_RT`.
            last_R: Column of each row's last confirmed token; the columns after it are ignored.
            newest_R: Each row's newest token, which follows the last confirmed token.
            position_R: Position of each row's newest token.
            cache: `cache.heads` contains the modules' caches, which are extended in place.
            choose: Chooses the drafts from states.

        Returns:
            The drafts, int64 `[R, D]`, and the distributions from which they were drawn, `[R, D, V]`; None
            instead of distributions for greedy decoding.
        """
        count = ids_RT.shape[1]
        column_C = torch.arange(count, device=ids_RT.device)
        from_RC = column_C + last_R[:, None] - (count - 1)
        index_RC = from_RC.clamp(min=0)
        next_RT = ids_RT.roll(-1, dims=1).scatter(1, last_R[:, None], newest_R[:, None])
        token_RC = next_RT.gather(1, index_RC)
        state_RCH = hidden_RTH.take_along_dim(index_RC[:, :, None], dim=1)
        first_R1 = (count - 1 - last_R)[:, None]
        recurrent, carried, drafted, probabilities = self._heads.wiring.recurrent, [], [], []
        for depth in range(1, self.drafts + 1):
            if depth > 1 and recurrent:
                place_RC = position_R[:, None] + (depth - 2)
                now_RC = torch.ones_like(place_RC, dtype=torch.bool)
                sources = _Sources(position_RC=place_RC, seen_RC=now_RC, lasting_RC=now_RC)
                state_RCH, token_RC = state_RCH[:, -1:], token_RC[:, -1:]
            else:
                if depth > 1:
                    state_RCH = self._with_carried(state_RCH, depth, column_R1=first_R1)
                column_C = torch.arange(state_RCH.shape[1], device=ids_RT.device)
                place_RC = position_R[:, None] - len(column_C) + column_C
                now_RC = (column_C >= first_R1) & (place_RC >= 0)
                lasting_RC = now_RC & (place_RC + depth <= position_R[:, None])
                sources = _Sources(position_RC=place_RC.clamp(min=0), seen_RC=now_RC, lasting_RC=lasting_RC)
            own = cache.heads[0 if recurrent else depth - 1]
            state_RCH = self._run(depth, state_RCH, token_RC, sources=sources, cache=own)
            carried.append(state_RCH[:, -min(depth, state_RCH.shape[1])][:, None])
            token_R1, probability = choose(self.policy.norm(state_RCH[:, -1:]), depth - 1)
            token_RC = torch.cat([token_RC, token_R1], dim=1)
            drafted.append(token_R1)
            probabilities.append(probability)
        if recurrent:  # the last columns belong to modules 2, 3, ..., which have read drafts
            lasting = self._seen[0].shape[1] - (self.drafts - 1)
            self._seen[0] = nn.functional.pad(self._seen[0][:, :lasting], (0, self.drafts - 1))
        self._carried = carried
        known = [each for each in probabilities if each is not None]
        return torch.cat(drafted, dim=1), torch.cat(known, dim=1) if known else None

    def keep(self, index_R: Tensor) -> None:
        """Drop all rows except the rows with the indices `index_R`."""
        self._seen = [each[index_R] for each in self._seen]
        self._carried = [each[index_R] for each in self._carried]

    @property
    def _heads(self) -> SequentialHeads:
        heads = self.policy.heads
        assert isinstance(heads, SequentialHeads)
        return heads

    def _with_carried(self, state_RCH: Tensor, depth: int, *, column_R1: Tensor) -> Tensor:
        """Return a module's input: one state from the last step, then the previous module's states."""
        padded_RCH = torch.cat([state_RCH[:, :1], state_RCH], dim=1)
        if not self._carried:
            return padded_RCH  # the first source has no source before it
        index = column_R1[:, :, None].expand(-1, -1, padded_RCH.shape[-1])
        return padded_RCH.scatter(1, index, self._carried[depth - 2])

    def _run(
        self, depth: int, state_RCH: Tensor, token_RC: Tensor, *, sources: _Sources, cache: Any
    ) -> Tensor:
        """Return the states `[R, C, H]` of module `depth`."""
        heads = self._heads
        number = 0 if heads.wiring.recurrent else depth - 1
        if len(self._seen) == number:
            self._seen.append(sources.seen_RC[:, :0])
        states = heads.run(
            depth + 1,
            state_RCH,
            embedded_BTH=heads.embedded(self.policy.trunk, token_RC, sources.position_RC, k=depth + 1),
            position_BT=sources.position_RC,
            cache=cache,
            seen_BS=torch.cat([self._seen[number], sources.seen_RC], dim=1),
        )
        self._seen[number] = torch.cat([self._seen[number], sources.lasting_RC], dim=1)
        return states


@frozen(kw_only=True, eq=False)
class _Sources:
    """The sources in the columns of a module's input.

    Attributes:
        position_RC: int64 positions.
        seen_RC: bool, False for columns without a source.
        lasting_RC: bool, True for sources that read no draft and therefore stay visible in later steps.
    """

    position_RC: Tensor
    seen_RC: Tensor
    lasting_RC: Tensor
