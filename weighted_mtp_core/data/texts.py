"""Encodes texts as token ids and decodes token ids to exactly the same bytes of text.

The prompt and the response of a document are encoded separately, so that no token spans the end of the prompt
and the ids of the prompt are the same in generation. Two properties of many tokenizers would change texts:

- Tokenizers like SentencePiece add a blank before a text and drop the blank when they decode. This module
  adds a blank only at the beginning of a document, not before a response.
- Tokenizers convert the name of a control token in a text, such as `<eos>`, to the control token. This module
  encodes the names of control tokens as ordinary text, except in rendered chats.

Both properties are disabled in a copy of the tokenizer's backend, the Rust library `tokenizers`. A tokenizer
that does more than its backend, or has no backend, is used as it is. Every document is decoded once to check
that the text is unchanged.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

from attrs import frozen

from weighted_mtp_core.data.chats import control_tokens
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.recipe.schema import DataTable

Bos = Literal["auto", "always", "never"]
Offsets = list[tuple[int, int]]

PROBES = (
    "def add(a, b):\n    return a + b\n",
    "    if x >= 10:\n\t\ty = 'It''s 1,234.50 €'\r\n",
    "Don't PANIC, they're here!  Two  blanks   and a tab\tor two.\n\n\n",
    "12345 0x1F 3.14e-10 2024-01-31 a1b2",
    "naïve Übergröße Ωμέγα 数学 🙂👩‍💻 x̂",
    'https://example.org/a_b?c=d&e=f#g {"key": [null, true]} $x^2$ <b>&amp;</b>',
    " leading and trailing blanks ",
)
"""Texts that pre-tokenizers split in different ways: blanks, digits, contractions, punctuation, scripts."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class TextCodec:
    """Encodes prompts and responses, and decodes completions.

    Args:
        tokenizer: A transformers tokenizer.
        bos: Whether documents begin with BOS: `auto` (if the tokenizer adds it), `always` or `never`.

    Attributes:
        tokenizer: The tokenizer.
        eos_id: Id of the EOS token, which ends each response.
        prefix: The ids before each prompt, such as BOS.
        size: Number of tokens of the tokenizer.

    Raises:
        WmtpError: `bos` is `always`, but the tokenizer has no BOS token.
    """

    def __init__(self, tokenizer: Any, *, bos: Bos = "auto") -> None:
        # If this variable is unset, the library disables parallelism in processes forked after its first use.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self.tokenizer = tokenizer
        self.eos_id = int(tokenizer.eos_token_id)
        self.size = len(tokenizer)
        self.prefix = _prefix(tokenizer, bos)
        self._encode_start, self._encode_rest = _encoders(tokenizer)
        names = tokenizer.all_special_tokens
        self._control_ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
        self._control = control_tokens(tokenizer)

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of prompts, including `prefix`."""
        return [[*self.prefix, *ids] for ids in self._encode_start(list(texts))]

    def encode_documents(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Return the ids of each prompt, including `prefix`, and of each response, without EOS."""
        prompts = self.encode_prompts([prompt for prompt, _ in pairs])
        responses = self._encode_rest([response for _, response in pairs])
        first = [i for i, (prompt, _) in enumerate(pairs) if not prompt]
        for i, ids in zip(first, self._encode_start([pairs[i][1] for i in first]), strict=True):
            responses[i] = ids
        return list(zip(prompts, responses, strict=True))

    def encode_chat(self, parts: Sequence[tuple[str, float | None]]) -> tuple[list[int], list[float | None]]:
        """Return the ids of a rendered chat, and the weight of each id; None for ids that are not learned.

        Args:
            parts: Texts with their weights; the weight is None if the text is not learned. The name of a
                control token becomes the control token, and no token spans two parts.
        """
        ids: list[int] = []
        weights: list[float | None] = []
        for encoder, piece, weight in self._pieces(parts):
            found = [self._control_ids[piece]] if encoder is None else encoder([piece])[0]
            ids += found
            weights += [weight] * len(found)
        return ids, weights

    def chat_offsets(self, parts: Sequence[tuple[str, float | None]]) -> Offsets | None:
        """Return start and end of each token of `encode_chat`, in characters of the whole chat.

        The result is None if the tokenizer does not report offsets.
        """
        offsets: Offsets = []
        at = 0
        for encoder, piece, _ in self._pieces(parts):
            own = [(0, len(piece))] if encoder is None else encoder.offsets(piece)
            if own is None:
                return None
            offsets += [(at + start, at + end) for start, end in own]
            at += len(piece)
        return offsets

    def _pieces(
        self, parts: Sequence[tuple[str, float | None]]
    ) -> Iterator[tuple[_Encoder | None, str, float | None]]:
        """Yield the encoder, the text and the weight of each piece; a control token's encoder is None."""
        encoder = self._encode_start
        for text, weight in parts:
            for piece in filter(None, self._control.split(text)):
                yield None if piece in self._control_ids else encoder, piece, weight
                encoder = self._encode_rest

    def decode_marked(self, ids: Sequence[int]) -> str:
        """Decode ids to a text in which control tokens appear by name."""
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def encode_part(self, text: str) -> list[int]:
        """Return the ids of a text that continues a response."""
        return self._encode_rest([text])[0]

    def decode_part(self, ids: Sequence[int]) -> str:
        """Return the text that these ids add to a response."""
        return self.decode_completions([(self._encode_rest(["a"])[0], ids)])[0]

    def response_offsets(self, prompt: str, response: str) -> Offsets | None:
        """Return start and end of each token of a response, in characters of the response.

        The tokens are the tokens that `encode_documents` returns for the response. The result is None if the
        tokenizer does not report offsets.
        """
        return (self._encode_rest if prompt else self._encode_start).offsets(response)

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of documents; control tokens are left out."""
        return _decode(self.tokenizer, rows)

    def decode_completions(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[str]:
        """Return the text that each completion adds to its prompt; a row is (ids of the prompt, new ids)."""
        prompts = self.decode([prompt for prompt, _ in rows])
        whole = self.decode([[*prompt, *new] for prompt, new in rows])
        return [text[len(prompt) :] for prompt, text in zip(prompts, whole, strict=True)]


def make_codec(tokenizer: Any, table: DataTable) -> TextCodec:
    """Return the codec of a recipe; if the recipe has a chat template, the tokenizer gets it.

    Raises:
        WmtpError: `data.bos` is `always`, but the tokenizer has no BOS token.
    """
    if table.chat_template is not None:
        tokenizer.chat_template = table.chat_template
    return TextCodec(tokenizer, bos=table.bos)


def round_trip_error(name: str, text: str, decoded: str) -> WmtpError:
    """Return the error for a document whose text changes when it is encoded and decoded."""
    same = (i for i, (one, other) in enumerate(zip(text, decoded, strict=False)) if one != other)
    at = next(same, min(len(text), len(decoded)))
    shown = slice(max(at - 20, 0), at + 40)
    if unicodedata.normalize("NFC", text) == decoded:
        hint = 'the tokenizer normalises texts: normalise the data too, `unicodedata.normalize("NFC", text)`'
    elif unicodedata.normalize("NFKC", text) == decoded:
        hint = 'the tokenizer normalises texts: normalise the data too, `unicodedata.normalize("NFKC", text)`'
    else:
        hint = "the tokenizer cannot represent this text: use another base model, or leave such texts out"
    return WmtpError(
        f"example `{name}` is a different text after encoding and decoding, from character {at} on:\n"
        f"  text:    {text[shown]!r}\n"
        f"  decoded: {decoded[shown]!r}",
        hint=hint,
    )


def differing_ids(one: Any, other: Any, texts: Sequence[str] = PROBES) -> str | None:
    """Compare two tokenizers by the ids of texts, of BOS and of EOS.

    Args:
        one: A transformers tokenizer, or an object that can be called like a tokenizer and has the attributes
            `bos_token_id` and `eos_token_id`.
        other: The tokenizer to compare with.
        texts: Texts that both tokenizers encode.

    Returns:
        A description of the first difference; None if there is no difference.
    """
    for text in texts:
        first, second = (each([text], add_special_tokens=False)["input_ids"][0] for each in (one, other))
        if list(first) != list(second):
            return f"{text!r} has the ids {_some(first)} and {_some(second)}"
    for kind in ("bos_token_id", "eos_token_id"):
        if getattr(one, kind) != getattr(other, kind):
            return f"`{kind}` is {getattr(one, kind)} and {getattr(other, kind)}"
    return None


def _decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    if not rows:
        return []
    texts: list[str] = tokenizer.batch_decode(
        [list(ids) for ids in rows], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts


def _some(ids: Sequence[int]) -> str:
    return f"{list(ids[:12])}" + (f" and {len(ids) - 12} more" if len(ids) > 12 else "")


def _prefix(tokenizer: Any, bos: Bos) -> tuple[int, ...]:
    """Return the ids with which every document begins, such as BOS."""
    if bos == "never":
        return ()
    if bos == "always":
        if tokenizer.bos_token_id is None:
            raise WmtpError('`data.bos` is "always", but the tokenizer has no BOS', hint='data.bos = "auto"')
        return (int(tokenizer.bos_token_id),)
    plain, special = (tokenizer(["a"], add_special_tokens=add)["input_ids"][0] for add in (False, True))
    start = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)
    return tuple(int(each) for each in special[:start])


class _Encoder(Protocol):
    """Encodes texts without BOS and EOS; names of control tokens are encoded as ordinary text."""

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""

    def offsets(self, text: str) -> Offsets | None:
        """Return start and end of each token of a text, in characters; None if they are unknown."""


@frozen
class _Plain:
    """Encodes with the transformers tokenizer itself."""

    tokenizer: Any

    def __call__(self, texts: list[str]) -> list[list[int]]:
        found = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [list(ids) for ids in found]

    def offsets(self, text: str) -> Offsets | None:
        if not self.tokenizer.is_fast:
            return None
        found = self.tokenizer(
            [text], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        return list(found["offset_mapping"][0])


class _Backend:
    """Encodes with a copy of the tokenizer's backend that has other settings."""

    def __init__(self, table: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(json.dumps(table))

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [each.ids for each in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def offsets(self, text: str) -> Offsets | None:
        offsets: Offsets = self._backend.encode(text, add_special_tokens=False).offsets
        return offsets


@frozen
class _WithBlank:
    """Adds a blank, which the decoder drops, before every text.

    Like the pre-tokenizer Metaspace, `start` alone adds no blank before a text that begins with a blank.
    """

    start: _Encoder
    rest: _Encoder

    def __call__(self, texts: list[str]) -> list[list[int]]:
        found = self.start(texts)
        blank = [i for i, text in enumerate(texts) if text.startswith(" ")]
        for i, ids in zip(blank, self.rest([f" {texts[i]}" for i in blank]), strict=True):
            found[i] = ids
        return found

    def offsets(self, text: str) -> Offsets | None:
        if not text.startswith(" "):
            return self.start.offsets(text)
        moved = self.rest.offsets(f" {text}")
        return moved and [(max(start - 1, 0), max(end - 1, 0)) for start, end in moved]


def _encoders(tokenizer: Any) -> tuple[_Encoder, _Encoder]:
    """Return two encoders: one for the beginning of a document, one for text that continues a document."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    plain = _Plain(tokenizer)
    if backend is None:
        return plain, plain
    table = _without_control_tokens(json.loads(backend.to_str()))
    start = _Backend(table)
    if start(list(PROBES)) != plain(list(PROBES)):  # the tokenizer does more than its backend
        return plain, plain
    changed = {**table, **{part: _without_blank(table[part]) for part in ("normalizer", "pre_tokenizer")}}
    if changed == table:
        return start, start
    rest = _Backend(changed)
    if _decode(tokenizer, start(["a"])) != ["a"]:  # the decoder does not drop the blank
        return rest, rest
    return _WithBlank(start, rest), rest


def _without_control_tokens(table: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer settings in which control tokens have names that no text contains.

    The ids of the control tokens stay the same. The setting `encode_special_tokens` is not enough, because
    WordPiece and Unigram models find the control tokens in their vocabulary.
    """
    names = {
        token["content"]: f"\U0010fffd{token['id']}\U0010fffd"
        for token in table["added_tokens"]
        if token["special"] and not _BYTE.fullmatch(token["content"])
    }
    model = dict(table["model"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    tokens = [
        {**each, "content": names.get(each["content"], each["content"])} for each in table["added_tokens"]
    ]
    unused = {"post_processor": None, "truncation": None, "padding": None}
    return {**table, "model": model, "added_tokens": tokens, **unused}


def _without_blank(part: Any) -> Any:
    """Return a normaliser or pre-tokenizer without the steps that add a blank before a text.

    The result is None if `part` is only such a step, or None.
    """
    if not isinstance(part, dict) or part["type"] == "Prepend":
        return None
    part = dict(part)
    for steps in ("normalizers", "pretokenizers"):
        if steps in part:
            part[steps] = [each for each in map(_without_blank, part[steps]) if each is not None]
    if part["type"] == "Metaspace":
        part["prepend_scheme"] = "never"
    if part["type"] == "ByteLevel":
        part["add_prefix_space"] = False
    return part
