"""Converts examples to token ids; an example is a prompt with a response, or a chat."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from weighted_mtp_core.api import Example
from weighted_mtp_core.data.chats import TrainOn, render_chat
from weighted_mtp_core.data.span_weights import span_weights
from weighted_mtp_core.data.texts import TextCodec, round_trip_error
from weighted_mtp_core.errors import WmtpError


@frozen(kw_only=True, eq=False)
class Document:
    """An example as token ids.

    Attributes:
        example: The example.
        ids: Token ids of the example, including EOS.
        prompt: Number of tokens before the first target.
        targets: Whether each token is a target; None means that all tokens from index `prompt` on are.
        weights: For a chat, the weight that each target gets from the `weight` and the spans of its message,
            and 0 for tokens that are not targets; None for an example that is not a chat.
    """

    example: Example
    ids: list[int]
    prompt: int
    targets: list[bool] | None = None
    weights: list[float] | None = None


def encode(
    examples: Sequence[Example], codec: TextCodec, *, max_tokens: int, train_on: TrainOn
) -> list[Document]:
    """Return the examples of at most `max_tokens` tokens as documents; chats come last.

    Raises:
        WmtpError: The ids of an example decode to a different text, a chat cannot be rendered, or a chat has
            weighted spans, but the tokenizer does not report for each character which tokens cover it.
    """
    plain = [example for example in examples if not example.messages]
    encoded = codec.encode_documents([(each.prompt, each.response) for each in plain])
    made = [
        Document(example=example, ids=[*prompt, *response, codec.eos_id], prompt=len(prompt))
        for example, (prompt, response) in zip(plain, encoded, strict=True)
    ]
    made += [_chat(example, codec, train_on) for example in examples if example.messages]
    kept = [each for each in made if len(each.ids) <= max_tokens]
    _check_texts([each for each in kept if each.targets is None], codec)
    return kept


def _check_texts(documents: Sequence[Document], codec: TextCodec) -> None:
    """Decode the ids and compare the result with the texts of the examples."""
    decoded = codec.decode([each.ids[:-1] for each in documents])
    for each, text in zip(documents, decoded, strict=True):
        own = each.example.prompt + each.example.response
        if text != own:
            raise round_trip_error(each.example.example_id, own, text)


def _chat(example: Example, codec: TextCodec, train_on: TrainOn) -> Document:
    try:
        chat = render_chat(codec.tokenizer, example.messages, tools=example.tools, train_on=train_on)
    except WmtpError as error:
        raise WmtpError(f"example `{example.example_id}`: {error}", hint=error.hint) from error
    ids, weights = codec.encode_chat(chat.parts)
    decoded = codec.decode_marked(ids)
    if decoded != chat.text:
        raise round_trip_error(example.example_id, chat.text, decoded)
    if chat.marks:
        offsets = codec.chat_offsets(chat.parts)
        factors = span_weights(
            chat.text, chat.marks, offsets, count=len(ids), name=example.example_id
        ).tolist()
        weights = [
            None if weight is None else weight * factor
            for weight, factor in zip(weights, factors, strict=True)
        ]
    if tuple(ids[: len(codec.prefix)]) != codec.prefix:
        ids, weights = [*codec.prefix, *ids], [*([None] * len(codec.prefix)), *weights]
    # Tokens after the end of the last turn are left out, because the policy never has to generate them.
    count = max(i for i, weight in enumerate(weights) if weight is not None) + 1
    ids, weights = ids[:count], weights[:count]
    if ids[-1] != codec.eos_id:
        ids, weights = [*ids, codec.eos_id], [*weights, weights[-1]]
    targets = [weight is not None for weight in weights]
    return Document(
        example=example,
        ids=ids,
        prompt=targets.index(True),
        targets=targets,
        weights=[weight or 0.0 for weight in weights],
    )
