"""Determine whether a policy can be decoded with drafts, with rows of different lengths, and with a cache.

The caches and masks of model families differ. A recurrent layer cannot forget a rejected draft, some families
measure distances in cache slots, and some keep additional states. The real `Decoder` is therefore run on a
few known tokens with some drafts rejected, and its logits are compared with the logits of one pass over the
whole text. A method of decoding that fails this test is not used: the text is still correct, but decoding is
slower.

Shape letters: R rows, T tokens, D drafted tokens, K heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from attrs import define, field, frozen
from torch import Tensor

from weighted_mtp_core.generation.decoding import Decoder
from weighted_mtp_core.generation.draft_heads import DecodingHeads
from weighted_mtp_core.messages import reason
from weighted_mtp_core.model.families import COUNTS_SLOTS, KEYS_AND_VALUES, cache_kinds
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.probe import probe_ids, windows_of
from weighted_mtp_core.runtime.device import evaluation_mode, full_precision

_TOLERANCE = 1e-3  # accepted difference relative to the largest logit; the order of sums has a smaller effect
_NARROW, _WIDE = 8, 1 << 20  # attention windows in tokens, narrower and wider than the text


@frozen(kw_only=True)
class Manner:
    """How a policy can be decoded: for each method, the reason why the method fails, or None if it works.

    Attributes:
        no_drafts: Why heads 2..K cannot draft.
        no_padding: Why prompts of different lengths cannot be decoded together.
        no_cache: Why no cache can be used, so that the whole text must be read again for each token.
    """

    no_drafts: str | None = None
    no_padding: str | None = None
    no_cache: str | None = None


def manner_of(policy: Policy, *, also_of: Policy | None = None) -> Manner:
    """Return how a policy can be decoded; the result does not depend on weights and is computed once.

    Args:
        policy: The policy.
        also_of: Another policy with the same parameters, for which the result is stored, too.
    """
    known = _MANNERS.get(policy)
    if known is None:
        with evaluation_mode(policy), full_precision(policy.unembedding.weight.device):
            known = _MANNERS[policy] = _find(policy)
    if also_of is not None:
        _MANNERS[also_of] = known
    return known


_MANNERS: WeakKeyDictionary[Policy, Manner] = WeakKeyDictionary()


@torch.no_grad()
def _find(policy: Policy) -> Manner:
    with windows_of(policy, _NARROW):
        no_padding = _fault(policy, drafts=0, starts=(5, 10))
        no_cache = None if no_padding is None else _fault(policy, drafts=0, starts=(7, 7))
    if no_cache is not None:
        return Manner(no_drafts=no_cache, no_padding=no_padding, no_cache=no_cache)
    if policy.n_future == 1:
        return Manner(no_drafts="there is one head", no_padding=no_padding)
    kinds = frozenset().union(*map(cache_kinds, (policy.trunk, *policy.heads.bodies)))
    if not kinds <= KEYS_AND_VALUES | {"DummyLayer"}:
        # Recurrent states cannot be rolled back, and layers that select a few tokens may select drafts.
        return Manner(no_drafts="some of its layers store more than keys and values", no_padding=no_padding)
    if policy.config.model_type in COUNTS_SLOTS:
        no_drafts: str | None = "distances are measured in slots of the cache"
    else:
        with windows_of(policy, _WIDE):
            starts = (5, 10) if no_padding is None else (7, 7)
            no_drafts = _fault(policy, drafts=policy.n_future - 1, starts=starts)
    return Manner(no_drafts=no_drafts, no_padding=no_padding)


def _fault(policy: Policy, *, drafts: int, starts: Sequence[int]) -> str | None:
    """Decode a known text; return a description of what is wrong, or None if the logits are correct."""
    device = policy.unembedding.weight.device
    ids_RT = probe_ids(policy.config, rows=len(starts)).to(device)
    try:
        hidden_RTH = policy.trunk_states(ids_RT)
        whole = [policy.logits(k, hidden_RTH, ids_BT=ids_RT).float() for k in range(1, drafts + 2)]
        decoder = _Following(
            heads=DecodingHeads.of(policy, drafts=drafts),
            temperature=0.0,
            generators=[torch.Generator() for _ in starts],
            ids_RT=ids_RT,
            whole=whole,
        )
        decoder.start([ids[:start] for ids, start in zip(ids_RT.tolist(), starts, strict=True)])
        for _ in range(3):
            decoder.step()
        decoder.keep([1])
        decoder.step()
    except Exception as error:  # noqa: BLE001 - an unknown model can raise any exception; it is reported
        return f"it fails with a cache ({reason(error)})"
    return None if decoder.gap <= _TOLERANCE else f"its logits differ with a cache (by {decoder.gap:.2g})"


@define(kw_only=True, eq=False)
class _Following(Decoder):
    """Decodes a known text regardless of the model's predictions and compares the logits at each step.

    Attributes:
        ids_RT: The text.
        whole: Logits `[R, T, V]` of each of the heads 1, 2, ... from one pass over the whole text.
        gap: The largest difference of logits so far, relative to the largest logit.
    """

    ids_RT: Tensor
    whole: list[Tensor]
    gap: float = field(default=0.0, init=False)
    _step: int = field(default=0, init=False)
    _rows: list[int] = field(init=False)

    @_rows.default
    def _all_rows(self) -> list[int]:
        return list(range(len(self.ids_RT)))

    def _verify(self, state_RTH: Tensor) -> tuple[Tensor, Tensor]:
        """Accept exactly the correct drafts; their number differs between rows and steps."""
        count_R = self._right_drafts()
        logits_RTV = self.heads.policy.unembedding(state_RTH)
        for row, count in enumerate(count_R.tolist()):
            first = int(self._position_R[row])
            self._compare(logits_RTV[row, : count + 1], self.whole[0][row, first : first + count + 1])
        self._step += 1
        return count_R, self._text_at(self._position_R + count_R + 1)

    def _choose(self, state_RTH: Tensor, first: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return tokens of the known text; for drafts, correct tokens followed by wrong tokens."""
        logits_RTV = self.heads.policy.unembedding(state_RTH)
        last_R = self._position_R - 1
        row_R = torch.arange(len(last_R), device=last_R.device)
        if self._draft_from is None:
            self._compare(logits_RTV[:, 0], self.whole[0][row_R, last_R])
            return self._text_at(self._position_R)[:, None], None
        offset_D = torch.arange(first, first + state_RTH.shape[1], device=last_R.device)
        for number, expected in enumerate(self.whole[first + 1 : first + 1 + len(offset_D)]):
            # The logits of a chained head can be compared only if all drafts that the head reads are correct.
            same_R = self._right_drafts() >= (first if self._chain is not None else 0)
            if bool(same_R.any()):
                self._compare(logits_RTV[same_R, number], expected[row_R, last_R][same_R])
        draft_RD = torch.stack([self._text_at(self._position_R + 1 + int(each)) for each in offset_D], dim=1)
        wrong_RD = offset_D >= self._right_drafts()[:, None]
        other = int(self.ids_RT[0, 0])
        return torch.where(wrong_RD, other, draft_RD), None

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows except the rows with the indices `rows`."""
        Decoder.keep(self, rows)
        self._rows = [self._rows[row] for row in rows]
        self.ids_RT = self.ids_RT[rows]
        self.whole = [each[rows] for each in self.whole]

    def _right_drafts(self) -> Tensor:
        """Return the number of correct drafts of each row in this step, `[R]`."""
        row_R = torch.tensor(self._rows, device=self.ids_RT.device)
        most = min(1 if self._chain is None else 2, self.heads.drafts)
        return (row_R + self._step) % (most + 1)

    def _text_at(self, position_R: Tensor) -> Tensor:
        last = self.ids_RT.shape[1] - 1
        return self.ids_RT.gather(1, position_R.clamp(max=last)[:, None])[:, 0]

    def _compare(self, actual: Tensor, expected: Tensor) -> None:
        gap = float((actual.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
        self.gap = gap if math.isnan(gap) or gap > self.gap else self.gap  # once NaN, it remains NaN


@define(kw_only=True, eq=False)
class UncachedDecoder(Decoder):
    """Decodes without a cache: reads the whole text again for each token.

    All rows must have the same length.
    """

    _ids_RT: Tensor = field(init=False)

    def start(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Store the prompts; return the first new token of each row."""
        device = self.heads.policy.unembedding.weight.device
        self._ids_RT = torch.tensor([list(ids) for ids in prompts], device=device)
        return self.step()

    def step(self) -> list[list[int]]:
        """Return the new token of each row."""
        policy = self.heads.policy
        self._seen_RS = torch.ones_like(self._ids_RT, dtype=torch.bool)
        state_RTH = policy.head_states(1, policy.trunk_states(self._ids_RT))
        newest_R1, _ = self._choose(state_RTH[:, -1:])
        self._ids_RT = torch.cat([self._ids_RT, newest_R1], dim=1)
        return [[token] for token in newest_R1[:, 0].tolist()]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows except the rows with the indices `rows`."""
        self._ids_RT = self._ids_RT[list(rows)]
        self.generators = [self.generators[row] for row in rows]


def decoder_of(policy: Policy) -> type[Decoder]:
    """Return the decoder class that a policy needs."""
    return Decoder if manner_of(policy).no_cache is None else UncachedDecoder


def batches(rows: Sequence[Any], lengths: Sequence[int], *, size: int, padding: bool) -> list[list[Any]]:
    """Divide rows into batches, shortest first; without padding, a batch has rows of one length only."""
    order = sorted(range(len(rows)), key=lambda index: lengths[index])
    found: list[list[Any]] = []
    previous = None
    for index in order:
        if not found or len(found[-1]) == size or (not padding and lengths[index] != previous):
            found.append([])
        found[-1].append(rows[index])
        previous = lengths[index]
    return found
