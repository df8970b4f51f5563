"""Store examples as token ids: one array holds a whole split, and each document is a slice of the array.

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
from weighted_mtp_core.data.chats import TrainOn
from weighted_mtp_core.data.documents import Document, encode
from weighted_mtp_core.data.given_weights import given_weights
from weighted_mtp_core.data.texts import TextCodec
from weighted_mtp_core.errors import WmtpError

_CHUNK = 1024  # documents per tokenizer call, which is 1.5x faster than one call per text
_META = "meta.json"
_GIVEN = "given"  # an array that is written only if the data contain weights
_DTYPES = {
    "target": np.bool_,
    "start": np.int64,
    "prompt": np.int32,
    "reward": np.float32,
    "problem": np.int64,
    "problem_hash": np.int64,
    "name": np.uint8,
    "name_start": np.int64,
    "metadata": np.uint8,
    "metadata_start": np.int64,
}
"""The dtypes of the arrays except `ids` and `given`, keyed by file name without `.npy`."""
Ints = NDArray[np.int64]


@frozen(kw_only=True, eq=False)
class TokenSet:
    """The documents of one split; each document is a prompt with a response, or a chat, and ends with EOS.

    Attributes:
        ids_N: Token ids of all documents: uint16 if the vocabulary is small enough, otherwise int32.
        start_D1: int64 `[D + 1]`; document d is `ids_N[start_D1[d] : start_D1[d + 1]]`.
        prompt_D: int32 number of tokens before the first target of each document.
        reward_D: float32 reward of each response.
        problem_D: int64 number of each document's problem; the numbers are in order of first appearance.
        example_ids: The example id of each document.
        metadata: The metadata of each document as JSON, or an empty text if a document has no metadata. The
            sequence may be empty if no document has metadata.
        target_N: bool, whether each token is learned; None means that all tokens after the prompt are.
        given_N: float32 weight that the data give each token, by default 1; 0 on tokens that are not learned.
            None if no document has weights.
        problem_hash_D: int64 hash of each document's problem id; None for a set that was not tokenised.
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
    target_N: NDArray[np.bool_] | None = None
    given_N: NDArray[np.float32] | None = None
    problem_hash_D: NDArray[np.int64] | None = None
    examples: int = 0
    left_out: int = 0
    sha256: str = ""

    def __len__(self) -> int:
        """Return D, the number of documents."""
        return len(self.prompt_D)

    @property
    def length_D(self) -> NDArray[np.int64]:
        """Number of tokens of each document, int64; computed at each access."""
        return np.diff(self.start_D1)

    @property
    def response_D(self) -> NDArray[np.int64]:
        """Number of targets of each document, int64; computed at each access."""
        if self.target_N is None:
            return self.length_D - self.prompt_D
        targets: NDArray[np.int64] = np.add.reduceat(self.target_N, self.start_D1[:-1], dtype=np.int64)
        return targets

    def lengths(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of tokens of each of the given documents, int64."""
        first = np.asarray(rows)
        lengths: NDArray[np.int64] = self.start_D1[first + 1] - self.start_D1[first]
        return lengths


def tokenise(
    examples: Iterable[Example],
    codec: TextCodec,
    *,
    max_tokens: int,
    folder: Path,
    train_on: TrainOn = "all",
) -> None:
    """Write examples as arrays, which `open_tokens` reads.

    Each response ends with EOS. Documents longer than `max_tokens` are counted and left out, because a
    truncated response would have a wrong label.

    Args:
        examples: The examples, which are iterated once.
        codec: Encodes chunks on all cores, unless `TOKENIZERS_PARALLELISM` is set to `false`.
        max_tokens: Maximum number of tokens of a document, EOS included.
        folder: An existing folder.
        train_on: Whether all turns of the assistant in a chat are learned, or only the last turn.

    Raises:
        WmtpError: No example is short enough, the ids of an example decode to a different text, a chat cannot
            be rendered, or a text has weighted spans, but the tokenizer does not report for each character
            which tokens cover it.
    """
    count = kept = tokens = unweighted = 0
    dtypes = {"ids": np.int32 if codec.size > 2**16 else np.uint16, **_DTYPES}
    left = iter(examples)
    with ExitStack() as stack:
        append = {
            name: stack.enter_context(array_appender(folder / f"{name}.npy", dtype))
            for name, dtype in dtypes.items()
        }
        while chunk := list(itertools.islice(left, _CHUNK)):
            documents = encode(chunk, codec, max_tokens=max_tokens, train_on=train_on)
            if _GIVEN not in append and any(each.example.has_weights for each in documents):
                append[_GIVEN] = stack.enter_context(array_appender(folder / f"{_GIVEN}.npy", np.float32))
                unweighted = tokens
                for start in range(0, unweighted, _CHUNK * _CHUNK):
                    append[_GIVEN](np.zeros(min(_CHUNK * _CHUNK, unweighted - start), dtype=np.float32))
            if _GIVEN in append:
                append[_GIVEN](given_weights(documents, codec))
            for name, values in _columns(documents).items():
                append[name](values)
            tokens += sum(len(each.ids) for each in documents)
            count += len(chunk)
            kept += len(documents)
    _weigh_targets(folder, unweighted)
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
        problem_hash_D=arrays["problem_hash"],
        example_ids=MappedStrings(arrays["name"], arrays["name_start"]),
        metadata=MappedStrings(arrays["metadata"], arrays["metadata_start"]),
        target_N=arrays["target"],
        given_N=mapped(given) if given.exists() else None,
        examples=meta["examples"],
        left_out=meta["left_out"],
        sha256=sha256,
    )


def _columns(documents: Sequence[Document]) -> dict[str, ArrayLike]:
    """Return the arrays of some documents.

    `start`, `name_start` and `metadata_start` contain lengths instead of offsets, and `problem` contains
    hashes instead of numbers.
    """
    examples = [each.example for each in documents]
    problems = [_hash(example.problem_id) for example in examples]
    names = [example.example_id.encode() for example in examples]
    metadata = [json.dumps(dict(each.metadata)).encode() if each.metadata else b"" for each in examples]
    return {
        "ids": list(itertools.chain.from_iterable(each.ids for each in documents)),
        "target": list(itertools.chain.from_iterable(map(_targets, documents))),
        "start": [len(each.ids) for each in documents],
        "prompt": [each.prompt for each in documents],
        "reward": [example.reward for example in examples],
        "problem": problems,
        "problem_hash": problems,
        "name": np.frombuffer(b"".join(names), dtype=np.uint8),
        "name_start": [len(name) for name in names],
        "metadata": np.frombuffer(b"".join(metadata), dtype=np.uint8),
        "metadata_start": [len(each) for each in metadata],
    }


def _targets(document: Document) -> list[bool]:
    if document.targets is not None:
        return document.targets
    return [False] * document.prompt + [True] * (len(document.ids) - document.prompt)


def _weigh_targets(folder: Path, count: int) -> None:
    """Give weight 1 to the targets among the first `count` tokens, which precede the first given weight.

    The tokens are read in parts, because there may be more of them than fit into memory.
    """
    for start in range(0, count, _CHUNK * _CHUNK):
        part = slice(start, min(start + _CHUNK * _CHUNK, count))
        weight_N = np.load(folder / f"{_GIVEN}.npy", mmap_mode="r+")
        weight_N[part] = mapped(folder / "target.npy")[part]


def _hash(problem_id: str) -> int:
    """Return a 64-bit hash of a problem id; a table of all ids would grow with the corpus."""
    return int.from_bytes(hashlib.blake2b(problem_id.encode(), digest_size=8).digest(), signed=True)


def _numbered(hash_D: Ints) -> Ints:
    """Number the distinct hashes in order of first appearance and return the number of each element."""
    _, first, inverse_D = np.unique(hash_D, return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[inverse_D]


def _replace(folder: Path, name: str, change: Callable[[Ints], Ints]) -> None:
    path = folder / f"{name}.npy"
    np.save(path, change(np.load(path)))
