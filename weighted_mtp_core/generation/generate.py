"""Write text with a policy: plain, or self-speculative, where its own extra heads draft and head 1 verifies.

Both give the same text: token for token when greedy, from the same distribution when sampled (blockwise
parallel decoding, Stern et al. 2018; Gloeckle et al. 2024, section 3.2).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from attrs import define, field, frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.generation.decoding import Decoder
from weighted_mtp_core.generation.draft_heads import AllHeads
from weighted_mtp_core.model.policy import Policy

Decoding = Literal["plain", "self_speculative"]


@frozen(kw_only=True)
class Generations:
    """What was written, and what it took.

    Attributes:
        tokens: New tokens of each prompt, without EOS.
        finished: Whether each ended with EOS, not at the limit.
        emitted: All new tokens, EOS included.
        passes: Forward passes, counted row by row, the prompt's own included.
        verified: Passes that verified drafts: those after the prompt's.
        accepted: How many of those kept the first, second, ... draft; a draft behind the text's end is not.
        seconds: Wall clock.
    """

    tokens: tuple[tuple[int, ...], ...]
    finished: tuple[bool, ...]
    emitted: int
    passes: int
    verified: int
    accepted: tuple[int, ...]
    seconds: float

    @property
    def tokens_per_forward(self) -> float:
        """New tokens over passes, row by row: 1 for plain decoding."""
        return self.emitted / max(self.passes, 1)

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of verifying passes that kept the first, second, ... draft."""
        return tuple(count / max(self.verified, 1) for count in self.accepted)

    @property
    def acceptance_length(self) -> float:
        """Tokens that a verifying pass gives: its own and the drafts it kept; 1 for plain decoding."""
        return 1.0 + sum(self.acceptance)


@define(kw_only=True)
class _Row:
    """A prompt on its way to `limit` new tokens."""

    index: int
    limit: int
    tokens: list[int] = field(factory=list)
    finished: bool = False

    def take(self, new: Sequence[int], *, eos_id: int) -> int:
        """Append tokens up to EOS or the limit; return how many were taken, EOS included."""
        for taken, token in enumerate(new, start=1):
            if token == eos_id:
                self.finished = True
                return taken
            self.tokens.append(token)
            if len(self.tokens) == self.limit:
                return taken
        return len(new)

    @property
    def is_done(self) -> bool:
        return self.finished or len(self.tokens) >= self.limit


@torch.inference_mode()
def generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 0.0,
    seed: int = 0,
    streams: Sequence[str] | None = None,
    decoding: Decoding = "plain",
    batch_size: int = 32,
    on_done: Callable[[int], None] | None = None,
) -> Generations:
    """Continue prompts of any lengths.

    Args:
        policy: Left in the mode it was in.
        prompts: Token ids; none may be empty.
        max_new_tokens: The limit for each; a text also ends where the model's positions end, with room kept
            for drafts, so that both ways of decoding end it at the same place.
        eos_id: Ends a row, also inside a draft.
        temperature: 0 is greedy.
        seed: With a prompt's stream it decides its samples, whatever else is in the batch.
        streams: A name for each prompt's random stream; its number by default.
        decoding: Plain, or drafted by heads 2..K. Texts that may leave a model's attention window are decoded
            plainly: refused drafts would take places in it.
        batch_size: Prompts decoded together, longest with longest.
        on_done: Told how many prompts are done.

    Raises:
        WmtpError: A prompt leaves no position to write at.
    """
    began = time.perf_counter()
    was_training = policy.training
    policy.eval()
    names = list(streams) if streams is not None else [str(i) for i in range(len(prompts))]
    drafts = _drafts(policy, decoding, longest=max(map(len, prompts), default=0), new=max_new_tokens)
    heads = AllHeads.of(policy, drafts=drafts)
    room = _room(policy)
    rows = [_Row(index=i, limit=_limit(len(ids), max_new_tokens, room=room)) for i, ids in enumerate(prompts)]
    tally = _Tally(accepted=[0] * drafts)
    done = 0
    by_length = sorted(rows, key=lambda row: len(prompts[row.index]))
    for first in range(0, len(rows), batch_size):
        live = by_length[first : first + batch_size]
        decoder = Decoder(
            heads=heads,
            temperature=temperature,
            generators=[_generator(seed, names[row.index]) for row in live],
        )
        gained = decoder.start([prompts[row.index] for row in live])
        tally.count(live, gained, eos_id=eos_id, verifying=False)
        while True:
            staying = [i for i, row in enumerate(live) if not row.is_done]
            if len(staying) < len(live):
                done += len(live) - len(staying)
                if on_done is not None:
                    on_done(done)
                live = [live[i] for i in staying]
                if not live:
                    break
                decoder.keep(staying)
            tally.count(live, decoder.step(), eos_id=eos_id, verifying=True)
    policy.train(was_training)
    return Generations(
        tokens=tuple(tuple(row.tokens) for row in rows),
        finished=tuple(row.finished for row in rows),
        emitted=tally.emitted,
        passes=tally.passes,
        verified=tally.verified,
        accepted=tuple(tally.accepted),
        seconds=time.perf_counter() - began,
    )


def _drafts(policy: Policy, decoding: Decoding, *, longest: int, new: int) -> int:
    """Return how many tokens heads 2, 3, ... draft for each step."""
    window: int | None = getattr(policy.config, "sliding_window", None)
    if decoding == "plain":
        return 0
    if window is not None and longest + new * policy.n_future > window:
        log = logging.getLogger(__name__)
        log.warning("decoding is not self-speculative: the model looks at a window of %d tokens", window)
        return 0
    return policy.n_future - 1


def _room(policy: Policy) -> int | None:
    """Return how long a prompt with its text may become, if the model says so."""
    positions: int | None = getattr(policy.config, "max_position_embeddings", None)
    return None if positions is None else positions - (policy.n_future - 1)


def _limit(length: int, max_new_tokens: int, *, room: int | None) -> int:
    if room is None:
        return max_new_tokens
    if length >= room:
        raise WmtpError(
            f"a prompt of {length} tokens leaves no room to write: this model reads up to {room}",
            hint="shorten the prompt, or use a base model with more positions",
        )
    return min(max_new_tokens, room - length)


@define(kw_only=True)
class _Tally:
    """Counts for `Generations`."""

    accepted: list[int]
    emitted: int = 0
    passes: int = 0
    verified: int = 0

    def count(
        self, rows: Sequence[_Row], gained: Sequence[list[int]], *, eos_id: int, verifying: bool
    ) -> None:
        """Give each row its new tokens and count them."""
        for row, new in zip(rows, gained, strict=True):
            taken = row.take(new, eos_id=eos_id)
            self.emitted += taken
            self.passes += 1
            self.verified += verifying
            for position in range(min(taken, len(new) - 1)):
                self.accepted[position] += 1


def _generator(seed: int, stream: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@frozen(kw_only=True)
class Sampled:
    """Completions of prompts: `completions[p][s]` is sample s of prompt p."""

    completions: tuple[tuple[str, ...], ...]
    generations: Generations

    def metrics(self) -> dict[str, float]:
        """Return what is the same in every run of a recipe.

        `acceptance_position_k` is the share of verifying passes that kept what head k drafted.
        """
        found = {
            "tokens_per_forward": self.generations.tokens_per_forward,
            "finished_share": sum(self.generations.finished) / max(len(self.generations.finished), 1),
        }
        if self.generations.accepted:
            found["acceptance_length"] = self.generations.acceptance_length
        for head, share in enumerate(self.generations.acceptance, start=2):
            found[f"acceptance_position_{head}"] = share
        return found

    def timings(self) -> dict[str, float]:
        """Return the measured speed."""
        seconds = max(self.generations.seconds, 1e-9)
        return {"generated_tokens_per_second": self.generations.emitted / seconds}


def sample_completions(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[tuple[str, str]],
    *,
    samples: int,
    temperature: float,
    seed: int,
    max_new_tokens: int,
    decoding: Decoding,
    batch_size: int,
    on_done: Callable[[int], None] | None = None,
) -> Sampled:
    """Write `samples` completions of each prompt; the text is not stripped, so indentation stays.

    A prompt is a name, which with `seed` decides its samples, and a text.
    """
    encoded = tokenizer([text for _, text in prompts], add_special_tokens=False)["input_ids"]
    found = generate(
        policy,
        [ids for ids in encoded for _ in range(samples)],
        max_new_tokens=max_new_tokens,
        eos_id=tokenizer.eos_token_id,
        temperature=temperature,
        seed=seed,
        streams=[f"{name}/{sample}" for name, _ in prompts for sample in range(samples)],
        decoding=decoding,
        batch_size=batch_size,
        on_done=on_done,
    )
    texts = tokenizer.batch_decode([list(ids) for ids in found.tokens], clean_up_tokenization_spaces=False)
    return Sampled(
        completions=tuple(tuple(texts[first : first + samples]) for first in range(0, len(texts), samples)),
        generations=found,
    )
