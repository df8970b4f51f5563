"""Examples as token ids: one flat array for a whole split, in which documents are slices.

The arrays are written chunk by chunk and mapped into memory afterwards: neither writing nor reading them
    needs
memory for the whole split.

Shape letters: N tokens of the split, D documents.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from attrs import frozen
from numpy.typing import ArrayLike, NDArray

from weighted_mtp_core.api import Example
from weighted_mtp_core.data.array_files import ArrayWriter, MappedStrings, mapped
from weighted_mtp_core.errors import WmtpError

_CHUNK = 1024  # documents per tokenizer call: batches are 1.5x faster than single texts
_SMALL = 2**16
_META = "meta.json"


class Tokenizer(Protocol):
    """The interface of transformers tokenizers that is used here."""

    eos_token_id: int

    def __len__(self) -> int:
        """Return V; every id is below it."""

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any:
        """Encode texts; the result maps `input_ids` to lists of ids."""


@frozen(kw_only=True, eq=False)
class TokenSet:
    """The documents of one split: prompt, response and EOS, one after the other.

    Attributes:
        ids_N: Token ids of all documents: uint16 where V allows it, else int32.
        start_D1: int64 `[D + 1]`; document d is `ids_N[start_D1[d] : start_D1[d + 1]]`.
        prompt_D: int32 number of prompt tokens of each document.
        reward_D: float32 reward of each response.
        problem_D: int64, equal exactly for documents of one problem.
        example_ids: The example id of each document.
        examples: Number of examples.
        left_out: Number of examples longer than `max_tokens`.
        sha256: SHA-256 of the folder of arrays.
    """

    ids_N: NDArray[np.integer[Any]]
    start_D1: NDArray[np.int64]
    prompt_D: NDArray[np.integer[Any]]
    reward_D: NDArray[np.float32]
    problem_D: NDArray[np.int64]
    example_ids: Sequence[str]
    examples: int = 0
    left_out: int = 0
    sha256: str = ""

    def __len__(self) -> int:
        """Return D."""
        return len(self.prompt_D)

    @property
    def length_D(self) -> NDArray[np.int64]:
        """Number of tokens of each document, int64; computed at each call."""
        return np.diff(self.start_D1)

    def lengths(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of tokens of some documents, int64."""
        first = np.asarray(rows)
        lengths: NDArray[np.int64] = self.start_D1[first + 1] - self.start_D1[first]
        return lengths


def tokenise(examples: Iterable[Example], tokenizer: Tokenizer, *, max_tokens: int, folder: Path) -> None:
    """Write examples as arrays of ids for `open_tokens`.

    Prompt and response are encoded separately, as when the policy generates, so that no token spans the
    boundary; the response ends with EOS. Documents longer than `max_tokens` are left out and counted: a
    truncated response would be a wrong label.

    Args:
        examples: Iterated once.
        tokenizer: Encodes batches on all cores, unless `TOKENIZERS_PARALLELISM` is set to `false`.
        max_tokens: The most tokens of a document, EOS included.
        folder: An existing folder.

    Raises:
        WmtpError: No example is short enough.
    """
    # Set before the first use; otherwise the library warns, and turns serial, in every process that a run
    # forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    count = kept = 0
    with _Writer(folder, wide=len(tokenizer) > _SMALL) as writer:
        for chunk in _chunks(examples):
            prompts = tokenizer([example.prompt for example in chunk], add_special_tokens=False)["input_ids"]
            responses = tokenizer([example.response for example in chunk], add_special_tokens=False)[
                "input_ids"
            ]
            documents = [
                (example, len(prompt), [*prompt, *response, tokenizer.eos_token_id])
                for example, prompt, response in zip(chunk, prompts, responses, strict=True)
                if len(prompt) + len(response) < max_tokens
            ]
            writer.add(documents)
            count += len(chunk)
            kept += len(documents)
    if not kept:
        raise WmtpError(
            f"none of the {count} examples has at most {max_tokens} tokens",
            hint="raise `data.max_tokens` or choose other data",
        )
    _number_problems(folder)
    (folder / _META).write_text(json.dumps({"examples": count, "left_out": count - kept}), encoding="utf-8")


def open_tokens(folder: Path, *, sha256: str) -> TokenSet:
    """Map the arrays that `tokenise` wrote into memory; `sha256` is that of the folder."""
    meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    arrays = {name: mapped(folder / f"{name}.npy") for name in (*_DTYPES, "ids")}
    return TokenSet(
        ids_N=arrays["ids"],
        start_D1=arrays["start"],
        prompt_D=arrays["prompt"],
        reward_D=arrays["reward"],
        problem_D=arrays["problem"],
        example_ids=MappedStrings(arrays["name"], arrays["name_start"]),
        examples=meta["examples"],
        left_out=meta["left_out"],
        sha256=sha256,
    )


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    left = iter(examples)
    while chunk := list(itertools.islice(left, _CHUNK)):
        yield chunk


_DTYPES = {
    "start": np.int64,
    "prompt": np.int32,
    "reward": np.float32,
    "problem": np.int64,
    "name": np.uint8,
    "name_start": np.int64,
}
"""The arrays beside the ids, by file name."""


class _Writer(ExitStack):
    """Appends documents to the arrays of a folder."""

    def __init__(self, folder: Path, *, wide: bool) -> None:
        super().__init__()
        kinds = {"ids": np.int32 if wide else np.uint16, **_DTYPES}
        self._arrays = {
            name: self.enter_context(ArrayWriter(folder / f"{name}.npy", dtype))
            for name, dtype in kinds.items()
        }
        self._end = self._name_end = 0
        self._arrays["start"].append([0])
        self._arrays["name_start"].append([0])

    def add(self, documents: Sequence[tuple[Example, int, list[int]]]) -> None:
        """Append documents: example, number of prompt tokens, ids."""
        if not documents:
            return
        names = [example.example_id.encode() for example, _, _ in documents]
        ends = self._end + np.cumsum([len(ids) for _, _, ids in documents])
        name_ends = self._name_end + np.cumsum([len(name) for name in names])
        self._end, self._name_end = int(ends[-1]), int(name_ends[-1])
        columns: dict[str, ArrayLike] = {
            "ids": list(itertools.chain.from_iterable(ids for _, _, ids in documents)),
            "start": ends,
            "prompt": [prompt for _, prompt, _ in documents],
            "reward": [example.reward for example, _, _ in documents],
            "problem": [_digest(example.problem_id) for example, _, _ in documents],
            "name": np.frombuffer(b"".join(names), dtype=np.uint8),
            "name_start": name_ends,
        }
        for name, values in columns.items():
            self._arrays[name].append(values)


def _digest(problem_id: str) -> int:
    """Return a 64-bit hash of a name: a table of all names would grow with the corpus."""
    return int.from_bytes(hashlib.blake2b(problem_id.encode(), digest_size=8).digest(), signed=True)


def _number_problems(folder: Path) -> None:
    """Replace the hashes of problems by numbers, in order of first appearance."""
    path = folder / "problem.npy"
    _, first, inverse_D = np.unique(np.load(path), return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    np.save(path, number[inverse_D])
