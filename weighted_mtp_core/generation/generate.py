"""Generate text with a policy by plain or self-speculative decoding: heads 2..K draft and head 1 verifies.

Plain and self-speculative decoding give the same tokens if decoding is greedy, and samples from the same
distribution otherwise (blockwise parallel decoding, Stern et al. 2018; Gloeckle et al. 2024, section 3.2). In
bfloat16, the logits of a block of several tokens are rounded differently than those of a single token, which
may change the choice between almost equally likely tokens.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from attrs import define, field, frozen

from weighted_mtp_core.data.texts import TextCodec
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.generation.decoding_probe import batches, decoder_of, manner_of
from weighted_mtp_core.generation.draft_heads import DecodingHeads
from weighted_mtp_core.model.families import text_config
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.runtime.device import Autocast, evaluation_mode, many_passes

Decoding = Literal["plain", "self_speculative"]


@frozen(kw_only=True)
class Generations:
    """Generated tokens and statistics of decoding.

    Attributes:
        tokens: New tokens of each prompt, without EOS.
        finished: Whether each text ended with EOS instead of at the limit.
        emitted: Number of new tokens of all prompts, including EOS.
        passes: Number of forward passes, summed over rows, including the pass over each prompt.
        verified: Number of passes except the passes over prompts; if heads draft, each of these passes
            verifies drafts.
        accepted: For the first, second, ... draft of a pass, the number of passes that accepted this draft;
            drafts after the end of the text do not count.
        seconds: Wall-clock time.
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
        """New tokens per row and forward pass: 1 for plain decoding."""
        return self.emitted / max(self.passes, 1)

    @property
    def acceptance(self) -> tuple[float, ...]:
        """For the first, second, ... draft of a pass, the share of verifying passes that accepted it."""
        return tuple(count / max(self.verified, 1) for count in self.accepted)

    @property
    def acceptance_length(self) -> float:
        """Tokens per verifying pass: the token of head 1 and the accepted drafts; 1 for plain decoding."""
        return 1.0 + sum(self.acceptance)

    def metrics(self) -> dict[str, float]:
        """Return the metrics that are equal in every run of the same recipe.

        `acceptance_position_k` is the share of verifying passes that accepted head k's draft.
        """
        metrics = {
            "tokens_per_forward": self.tokens_per_forward,
            "finished_share": sum(self.finished) / max(len(self.finished), 1),
        }
        if self.accepted:
            metrics["acceptance_length"] = self.acceptance_length
        for head, share in enumerate(self.acceptance, start=2):
            metrics[f"acceptance_position_{head}"] = share
        return metrics

    def timings(self) -> dict[str, float]:
        """Return the measured speed."""
        return {"generated_tokens_per_second": self.emitted / max(self.seconds, 1e-9)}


@define(kw_only=True)
class _Row:
    """The new tokens of one prompt, at most `limit`, and each forward pass's number of accepted drafts."""

    index: int
    limit: int
    tokens: list[int] = field(factory=list)
    accepted: list[int] = field(factory=list)
    emitted: int = 0
    finished: bool = False

    def take(self, new: Sequence[int], *, eos_id: int) -> None:
        """Append the new tokens of a pass, drafts first, up to EOS or the limit."""
        taken = 0
        while taken < len(new) and not self.is_done:
            if new[taken] == eos_id:
                self.finished = True
            else:
                self.tokens.append(new[taken])
            taken += 1
        self.emitted += taken
        self.accepted.append(min(taken, len(new) - 1))

    @property
    def is_done(self) -> bool:
        return self.finished or len(self.tokens) >= self.limit


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
    autocast: Autocast = nullcontext,
) -> Generations:
    """Generate continuations of prompts, which may have different lengths.

    Args:
        policy: The policy; it is used in evaluation mode, and its mode is restored afterwards.
        prompts: Token ids of each prompt; no prompt may be empty.
        max_new_tokens: Maximum number of new tokens per prompt. A text also ends K - 1 positions before the
            model's last position, which leaves space for drafts, so that all methods give the same text.
        eos_id: Id of EOS, which ends a text even if it is one of the drafts.
        temperature: Sampling temperature; 0 is greedy decoding.
        seed: Seed of the random numbers. The random numbers for a prompt depend only on the seed and the
            prompt's stream, not on the batch.
        streams: Names of the prompts' random streams; by default the index of each prompt.
        decoding: `plain`, or `self_speculative` with drafts of heads 2..K. Nothing is drafted, and a warning
            is logged, if heads 2..K of this policy cannot draft (see `Manner`), or if a text and its rejected
            drafts might not fit into a sliding window, because rejected drafts take slots of the window. With
            K = 1, nothing is drafted either, but no warning is logged.
        batch_size: Number of prompts that are decoded together; prompts of similar length are grouped.
        on_done: Called with the number of finished prompts.
        autocast: Returns the autocast context of a forward pass.

    Raises:
        WmtpError: A prompt has no tokens, or is so long that the model has no position left for new tokens.
    """
    began = time.perf_counter()
    names = list(streams) if streams is not None else [str(i) for i in range(len(prompts))]
    manner = manner_of(policy)
    drafts = _drafts(policy, decoding, longest=max(map(len, prompts), default=0), new=max_new_tokens)
    rows = [_Row(index=i, limit=_limit(policy, len(ids), max_new_tokens)) for i, ids in enumerate(prompts)]
    done = 0
    lengths = [len(ids) for ids in prompts]
    with evaluation_mode(policy), many_passes(policy, autocast):
        heads = DecodingHeads.of(policy, drafts=drafts)
        for batch in batches(rows, lengths, size=batch_size, padding=manner.no_padding is None):
            live = batch
            decoder = decoder_of(policy)(
                heads=heads,
                temperature=temperature,
                generators=[_generator(seed, names[row.index]) for row in live],
            )
            gained = decoder.start([prompts[row.index] for row in live])
            while True:
                for row, new in zip(live, gained, strict=True):
                    row.take(new, eos_id=eos_id)
                staying = [i for i, row in enumerate(live) if not row.is_done]
                if len(staying) < len(live):
                    done += len(live) - len(staying)
                    if on_done is not None:
                        on_done(done)
                    live = [live[i] for i in staying]
                    if not live:
                        break
                    decoder.keep(staying)
                gained = decoder.step()
    accepted = [count for row in rows for count in row.accepted]
    return Generations(
        tokens=tuple(tuple(row.tokens) for row in rows),
        finished=tuple(row.finished for row in rows),
        emitted=sum(row.emitted for row in rows),
        passes=len(accepted),
        verified=len(accepted) - len(rows),
        accepted=tuple(sum(count > i for count in accepted) for i in range(drafts)),
        seconds=time.perf_counter() - began,
    )


def _drafts(policy: Policy, decoding: Decoding, *, longest: int, new: int) -> int:
    """Return the number of tokens to draft in each step."""
    if decoding == "plain" or policy.n_future == 1:
        return 0
    why = manner_of(policy).no_drafts
    window = _window(policy) if why is None else None
    if window is not None and longest + new * policy.n_future > window:
        why = f"the model looks at a window of {window} tokens"
    if why is None:
        return policy.n_future - 1
    logging.getLogger(__name__).warning("decoding is not self-speculative: %s", why)
    return 0


def _window(policy: Policy) -> int | None:
    """Return the size of the narrowest attention window in tokens, or None if no layer has a window."""
    caches = policy.new_caches()
    layers = [layer for cache in (caches.trunk, *caches.heads) for layer in cache.layers]
    return min((layer.sliding_window for layer in layers if hasattr(layer, "sliding_window")), default=None)


def most_tokens(policy: Policy) -> float:
    """Return the maximum number of tokens of prompt and text together, with space for drafts after the text.

    The number is infinite if the config of the model does not limit positions.
    """
    positions: int | None = getattr(text_config(policy.config), "max_position_embeddings", None)
    return math.inf if positions is None else positions - (policy.n_future - 1)


def _limit(policy: Policy, length: int, max_new_tokens: int) -> int:
    """Return the maximum number of new tokens for a prompt of `length` tokens."""
    longest = most_tokens(policy)
    if length == 0:
        raise WmtpError(
            "a prompt has no tokens, so there is no text to continue",
            hint='give each prompt a text, or begin prompts with BOS: `data.bos = "always"`',
        )
    if length >= longest:
        raise WmtpError(
            f"a prompt of {length} tokens is too long: prompt and text can have "
            f"{longest} tokens with this model and K = {policy.n_future}",
            hint="shorten the prompt, or use a base model with more positions",
        )
    return int(min(max_new_tokens, longest - length))


def _generator(seed: int, stream: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@frozen(kw_only=True)
class Sampled:
    """Sampled completions: `completions[p][s]` is sample s of prompt p."""

    completions: tuple[tuple[str, ...], ...]
    generations: Generations


def sample_completions(
    policy: Policy,
    codec: TextCodec,
    prompts: Sequence[tuple[str, str]],
    *,
    samples: int,
    temperature: float,
    seed: int,
    max_new_tokens: int,
    decoding: Decoding,
    batch_size: int,
    on_done: Callable[[int], None] | None = None,
    autocast: Autocast = nullcontext,
) -> Sampled:
    """Return `samples` completions of each prompt, as texts without control tokens.

    A prompt is a pair (name, text); the name and `seed` determine the random numbers for the prompt.

    Raises:
        WmtpError: A prompt has no tokens or is too long, as in `generate`.
    """
    repeated = [ids for ids in codec.encode_prompts([text for _, text in prompts]) for _ in range(samples)]
    generations = generate(
        policy,
        repeated,
        max_new_tokens=max_new_tokens,
        eos_id=codec.eos_id,
        temperature=temperature,
        seed=seed,
        streams=[f"{name}/{sample}" for name, _ in prompts for sample in range(samples)],
        decoding=decoding,
        batch_size=batch_size,
        on_done=on_done,
        autocast=autocast,
    )
    texts = codec.decode_completions(list(zip(repeated, generations.tokens, strict=True)))
    return Sampled(
        completions=tuple(tuple(texts[first : first + samples]) for first in range(0, len(texts), samples)),
        generations=generations,
    )
