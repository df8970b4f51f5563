"""Examples as token ids: one flat array for a whole split; each document is a slice of it.

The arrays are written in chunks and mapped into memory for reading, so a split may be larger than the memory.

Shape letters: N tokens of the split, D documents.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import ArrayLike, NDArray

from weighted_mtp_core.api import Example
from weighted_mtp_core.data.array_files import MappedStrings, array_appender, mapped
from weighted_mtp_core.data.given_weights import given_weights
from weighted_mtp_core.data.texts import TextCodec, round_trip_error
from weighted_mtp_core.errors import WmtpError

_CHUNK = 1024  # documents per tokenizer call, which is 1.5x faster than one call per text
_META = "meta.json"
_GIVEN = "given"  # an array that is written only if the data give weights
_DTYPES = {
    "start": np.int64,
    "prompt": np.int32,
    "reward": np.float32,
    "problem": np.int64,
    "name": np.uint8,
    "name_start": np.int64,
    "metadata": np.uint8,
    "metadata_start": np.int64,
}
"""The arrays other than the ids, keyed by file name."""
Ints = NDArray[np.int64]


@frozen(kw_only=True, eq=False)
class TokenSet:
    """The documents of one split; each document consists of prompt, response and EOS.

    Attributes:
        ids_N: Token ids of all documents: uint16 if V allows it, otherwise int32.
        start_D1: int64 `[D + 1]`; document d is `ids_N[start_D1[d] : start_D1[d + 1]]`.
        prompt_D: int32 number of prompt tokens of each document.
        reward_D: float32 reward of each response.
        problem_D: int64 number of each document's problem; the numbers are in order of first appearance.
        example_ids: The example id of each document.
        metadata: The metadata of each document as JSON; empty if it has none.
        given_N: float32 weight that the data give each token, 0 on prompts; None if they give none.
        examples: Number of examples, including those that were left out.
        left_out: Number of examples longer than `max_tokens`.
        sha256: SHA-256 of the folder that contains the arrays.
    """

    ids_N: NDArray[np.integer[Any]]
    start_D1: NDArray[np.int64]
    prompt_D: NDArray[np.integer[Any]]
    reward_D: NDArray[np.float32]
    problem_D: NDArray[np.int64]
    example_ids: Sequence[str]
    metadata: Sequence[str] = ()
    given_N: NDArray[np.float32] | None = None
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
        """Return the number of tokens of each of the given documents, int64."""
        first = np.asarray(rows)
        lengths: NDArray[np.int64] = self.start_D1[first + 1] - self.start_D1[first]
        return lengths


def tokenise(examples: Iterable[Example], codec: TextCodec, *, max_tokens: int, folder: Path) -> None:
    """Write examples as arrays of ids for `open_tokens`.

    The response ends with EOS. Documents longer than `max_tokens` are counted and left out, because a
    truncated response would have a wrong label.

    Args:
        examples: Iterated once.
        codec: Encodes batches on all cores, unless `TOKENIZERS_PARALLELISM` is set to `false`.
        max_tokens: Maximum number of tokens of a document, EOS included.
        folder: An existing folder.

    Raises:
        WmtpError: No example is short enough, or the ids of one are another text than its own, or the tokens
            of a weighted span are unknown.
    """
    count = kept = tokens = 0
    dtypes = {"ids": np.int32 if codec.size > 2**16 else np.uint16, **_DTYPES}
    left = iter(examples)
    with ExitStack() as stack:
        append = {
            name: stack.enter_context(array_appender(folder / f"{name}.npy", dtype))
            for name, dtype in dtypes.items()
        }
        while chunk := list(itertools.islice(left, _CHUNK)):
            encoded = codec.encode_documents([(each.prompt, each.response) for each in chunk])
            documents = [
                (example, len(prompt), [*prompt, *response, codec.eos_id])
                for example, (prompt, response) in zip(chunk, encoded, strict=True)
                if len(prompt) + len(response) < max_tokens
            ]
            _check_texts(documents, codec)
            if _GIVEN not in append and any(example.has_weights for example, _, _ in documents):
                append[_GIVEN] = stack.enter_context(array_appender(folder / f"{_GIVEN}.npy", np.float32))
                _repeat_one(append[_GIVEN], tokens)
            if _GIVEN in append:
                append[_GIVEN](given_weights(documents, codec))
            for name, values in _columns(documents).items():
                append[name](values)
            tokens += sum(len(ids) for _, _, ids in documents)
            count += len(chunk)
            kept += len(documents)
    if not kept:
        raise WmtpError(
            f"none of the {count} examples has at most {max_tokens} tokens",
            hint="raise `data.max_tokens` or choose other data",
        )
    for name in ("start", "name_start", "metadata_start"):
        _replace(folder, name, lambda length_D: np.concatenate([[0], np.cumsum(length_D)]))
    _replace(folder, "problem", _numbered)
    (folder / _META).write_text(json.dumps({"examples": count, "left_out": count - kept}), encoding="utf-8")


def open_tokens(folder: Path, *, sha256: str) -> TokenSet:
    """Map the arrays written by `tokenise` into memory; `sha256` is the SHA-256 of the folder."""
    meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    arrays = {name: mapped(folder / f"{name}.npy") for name in (*_DTYPES, "ids")}
    given = folder / f"{_GIVEN}.npy"
    return TokenSet(
        ids_N=arrays["ids"],
        start_D1=arrays["start"],
        prompt_D=arrays["prompt"],
        reward_D=arrays["reward"],
        problem_D=arrays["problem"],
        example_ids=MappedStrings(arrays["name"], arrays["name_start"]),
        metadata=MappedStrings(arrays["metadata"], arrays["metadata_start"]),
        given_N=mapped(given) if given.exists() else None,
        examples=meta["examples"],
        left_out=meta["left_out"],
        sha256=sha256,
    )


def _check_texts(documents: Sequence[tuple[Example, int, list[int]]], codec: TextCodec) -> None:
    """Decode the ids and compare the result with the texts of the examples."""
    decoded = codec.decode([ids[:-1] for _, _, ids in documents])
    for (example, _, _), text in zip(documents, decoded, strict=True):
        if text != example.prompt + example.response:
            raise round_trip_error(example.example_id, example.prompt + example.response, text)


def _columns(documents: Sequence[tuple[Example, int, list[int]]]) -> dict[str, ArrayLike]:
    """Return the arrays of documents (example, number of prompt tokens, ids); `start` contains lengths."""
    names = [example.example_id.encode() for example, _, _ in documents]
    metadata = [
        json.dumps(dict(example.metadata)).encode() if example.metadata else b""
        for example, _, _ in documents
    ]
    return {
        "ids": list(itertools.chain.from_iterable(ids for _, _, ids in documents)),
        "start": [len(ids) for _, _, ids in documents],
        "prompt": [prompt for _, prompt, _ in documents],
        "reward": [example.reward for example, _, _ in documents],
        "problem": [_digest(example.problem_id) for example, _, _ in documents],
        "name": np.frombuffer(b"".join(names), dtype=np.uint8),
        "name_start": [len(name) for name in names],
        "metadata": np.frombuffer(b"".join(metadata), dtype=np.uint8),
        "metadata_start": [len(each) for each in metadata],
    }


def _repeat_one(append: Callable[[ArrayLike], None], count: int) -> None:
    """Append weights of 1, in parts: a whole corpus may precede the first weight."""
    for start in range(0, count, _CHUNK * _CHUNK):
        append(np.ones(min(_CHUNK * _CHUNK, count - start), dtype=np.float32))


def _digest(problem_id: str) -> int:
    """Return a 64-bit hash of a problem id; a table of all ids would grow with the corpus."""
    return int.from_bytes(hashlib.blake2b(problem_id.encode(), digest_size=8).digest(), signed=True)


def _numbered(digest_D: Ints) -> Ints:
    """Number the distinct hashes in order of first appearance and return the number of each element."""
    _, first, inverse_D = np.unique(digest_D, return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[inverse_D]


def _replace(folder: Path, name: str, change: Callable[[Ints], Ints]) -> None:
    path = folder / f"{name}.npy"
    np.save(path, change(np.load(path)))
