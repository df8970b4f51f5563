"""Documents with the lengths of HumanEval's problems, without downloading a tokenizer.

For each problem, humaneval_lengths.json contains two lengths, in tokens of SmolLM2's tokenizer: the length of
the prompt, and the length of the canonical solution including the end-of-text token. The sum of both lengths
is 200 on average and 582 at most. The token ids are random, because no measured time depends on them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from weighted_mtp_core.data.tokens import TokenSet

_LENGTHS = Path(__file__).with_suffix(".json")
_SPECIAL = 2  # number of special ids: padding and end of text
END = 1


def humaneval_tokens(vocabulary: int, *, limit: int | None = None) -> TokenSet:
    """Return one document for each problem, or only for the first `limit` problems."""
    length_D2 = np.asarray(json.loads(_LENGTHS.read_text())[:limit])
    end_D = np.cumsum(length_D2.sum(axis=1))
    ids_N = np.random.default_rng(0).integers(_SPECIAL, vocabulary, size=end_D[-1])
    ids_N[end_D - 1] = END
    return TokenSet(
        ids_N=ids_N.astype(np.int32),
        start_D1=np.concatenate([[0], end_D]),
        prompt_D=length_D2[:, 0].astype(np.int32),
        reward_D=np.ones(len(end_D), dtype=np.float32),
        problem_D=np.arange(len(end_D)),
        example_ids=[str(d) for d in range(len(end_D))],
    )
