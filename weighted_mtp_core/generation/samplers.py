"""Samples texts together with the log-probability of each token, for the command `data sample`.

Shape letters: R rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from attrs import frozen

from weighted_mtp_core.data.texts import TextCodec
from weighted_mtp_core.data.token_texts import token_texts
from weighted_mtp_core.generation.generate import sample_completions
from weighted_mtp_core.model.chunked_unembedding import ChunkedUnembedding
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.recipe.schema import EvaluateTable
from weighted_mtp_core.runtime.device import Autocast, evaluation_mode


@frozen(kw_only=True)
class SampledText:
    """A text that a model wrote after a prompt.

    Attributes:
        text: The text, without control tokens.
        finished: Whether the text ended with EOS instead of at the limit.
        tokens: The text that each token adds; a control token adds its name. The last token of a finished
            text is EOS, unless a server omits EOS.
        logprobs: The log-probability of each token in nats under the model at temperature 1, whatever the
            temperature of the samples.
        seed: Seed of the random numbers with which the text was sampled.
    """

    text: str
    finished: bool
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    seed: int


class Sampler(Protocol):
    """Samples texts of a model."""

    @property
    def at_once(self) -> int:
        """The recommended number of texts per call of `sample`."""

    def sample(
        self, prompts: Sequence[tuple[str, str]], *, on_done: Callable[[int], None]
    ) -> list[list[SampledText]]:
        """Return texts for each prompt; the number per prompt is the sampler's `EvaluateTable.samples`.

        Args:
            prompts: Pairs (name, text); the name and the sampler's seed determine the random numbers.
            on_done: Called with the number of finished texts.

        Raises:
            WmtpError: A prompt has no tokens or is too long, or a server refuses the request or answers
                without log-probabilities.
            RunFailedError: After all retries, a server does not answer or still reports that it is busy or
                has an internal error.
        """


@frozen(kw_only=True, eq=False)
class PolicySampler:
    """Samples from a policy in this process.

    Attributes:
        policy: The policy.
        codec: The codec between texts and the policy's tokens.
        table: Number, temperature and length of the samples, and how they are decoded.
        seed: Seed of all samples.
        autocast: Returns the autocast context of a forward pass.
    """

    policy: Policy
    codec: TextCodec
    table: EvaluateTable
    seed: int
    autocast: Autocast

    @property
    def at_once(self) -> int:
        """The recommended number of texts per call of `sample`: one batch."""
        return self.table.batch_size

    def sample(
        self, prompts: Sequence[tuple[str, str]], *, on_done: Callable[[int], None]
    ) -> list[list[SampledText]]:
        """Return the samples that the command `evaluate` would judge; see `Sampler.sample`."""
        table = self.table
        sampled = sample_completions(
            self.policy,
            self.codec,
            prompts,
            samples=table.samples,
            temperature=table.temperature,
            seed=self.seed,
            max_new_tokens=table.max_new_tokens,
            decoding=table.decoding,
            batch_size=table.batch_size,
            on_done=on_done,
            autocast=self.autocast,
        )
        prompt_ids = self.codec.encode_prompts([text for _, text in prompts])
        repeated = [ids for ids in prompt_ids for _ in range(table.samples)]
        written = sampled.generations
        new = [
            [*ids, self.codec.eos_id] if finished else list(ids)
            for ids, finished in zip(written.tokens, written.finished, strict=True)
        ]
        logprobs = token_logprobs(
            self.policy,
            list(zip(repeated, new, strict=True)),
            batch_size=self.at_once,
            autocast=self.autocast,
        )
        texts = [text for row in sampled.completions for text in row]
        flat = [
            SampledText(
                text=text,
                finished=finished,
                tokens=tuple(token_texts(self.codec.tokenizer, [*prompt, *ids])[len(prompt) :]),
                logprobs=tuple(numbers),
                seed=self.seed,
            )
            for text, finished, prompt, ids, numbers in zip(
                texts, written.finished, repeated, new, logprobs, strict=True
            )
        ]
        return [flat[first : first + table.samples] for first in range(0, len(flat), table.samples)]


@torch.inference_mode()
def token_logprobs(
    policy: Policy,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int,
    autocast: Autocast = nullcontext,
) -> list[list[float]]:
    """Return the log-probability of each new token under head 1 at temperature 1, in nats.

    Args:
        policy: The policy; it is used in evaluation mode, and its mode is restored afterwards.
        rows: Pairs (ids of the prompt, new ids); no prompt may be empty.
        batch_size: Number of rows in a forward pass.
        autocast: Returns the autocast context of a forward pass.
    """
    device = policy.unembedding.weight.device
    found: list[list[float]] = []
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        width = max(len(prompt) + len(new) for prompt, new in batch)
        ids_RT = torch.tensor(
            [[*prompt, *new, *[0] * (width - len(prompt) - len(new))] for prompt, new in batch], device=device
        )
        positions = [
            row * width + t
            for row, (prompt, new) in enumerate(batch)
            for t in range(len(prompt) - 1, len(prompt) + len(new) - 1)
        ]
        index_N = torch.tensor(positions, dtype=torch.int64, device=device)
        with evaluation_mode(policy), autocast():
            state_RTH = policy.head_states(1, policy.trunk_states(ids_RT))
            ce_N = ChunkedUnembedding.of(policy, state_RTH).losses(
                state_RTH, index_N, ids_RT.flatten()[index_N + 1]
            )
        flat = iter((-ce_N).tolist())
        found += [[next(flat) for _ in new] for _, new in batch]
    return found
