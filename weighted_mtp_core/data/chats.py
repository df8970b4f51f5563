"""Renders chats as texts with the tokenizer's chat template, and finds the turns that the policy learns.

A template with `{% generation %}` marks the assistant's turns itself. With other templates, a turn is found
by comparing two renderings: the messages before the turn, followed by the generation prompt, and the messages
up to the end of the turn. The turn is the text that only the longer rendering contains. The comparison is
correct only if the template neither drops nor reorders text, which is checked against the rendering of the
whole chat.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from attrs import frozen
from jinja2 import TemplateError

from weighted_mtp_core.api.data import Span
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import reason

TrainOn = Literal["all", "last"]
Message = Mapping[str, Any]
_MARK = 0x100000  # first private-use character of Unicode's plane 16; icons in texts use lower planes
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@frozen(kw_only=True)
class RenderedChat:
    """A chat as text.

    Attributes:
        text: The text of the chat, including the names of control tokens.
        spans: (start, end) of each learned turn, in characters of `text`.
        weights: Weight of each learned turn.
        marks: The weighted spans inside learned messages, in characters of `text`.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    marks: tuple[Span, ...] = ()

    @property
    def parts(self) -> list[tuple[str, float | None]]:
        """The parts of the text as pairs (text, weight); the weight is None if the part is not learned."""
        edges = [0, *(edge for span in self.spans for edge in span), len(self.text)]
        parts = [
            (self.text[start:end], self.weights[i // 2] if i % 2 else None)
            for i, (start, end) in enumerate(itertools.pairwise(edges))
        ]
        return [(text, weight) for text, weight in parts if text]


def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern with one group that matches the name of any control token."""
    names = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, names))})")


def render_chat(
    tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[Message], train_on: TrainOn
) -> RenderedChat:
    """Render a chat with the tokenizer's template.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The messages in the form that the template needs; the last message is the assistant's. The
            keys `weight` and `weights` of a message are not passed to the template.
        tools: Descriptions of tools for the template.
        train_on: Whether all turns of the assistant are learned, or only the last turn.

    Raises:
        WmtpError: The tokenizer has no chat template, the template is not valid or refuses the messages, a
            message contains a control token, turns or weighted spans cannot be found in the rendered text, or
            a message has a `weight` but the number of learned turns that the template marks differs from the
            number of learned messages.
    """
    if tokenizer.chat_template is None:
        raise WmtpError(
            "the tokenizer has no chat template", hint="give one in the recipe: `data.chat_template`"
        )
    spelt = control_tokens(tokenizer).search(json.dumps(list(messages), ensure_ascii=False))
    if spelt:
        raise WmtpError(
            f"a message contains `{spelt[0]}`, which is a control token of the tokenizer",
            hint="remove it: the template writes the control tokens",
        )
    weights = [float(each.get("weight", 1)) for each in messages if each["role"] == "assistant"]
    shown = [
        {key: value for key, value in each.items() if key not in {"weight", "weights"}} for each in messages
    ]
    find = _by_marks if _GENERATION.search(tokenizer.chat_template) else _by_prefixes
    try:
        text, spans = find(tokenizer, shown, tools, train_on)
    except TemplateError as error:
        raise WmtpError(
            f"the chat template cannot render the messages ({reason(error)})",
            hint="change the messages, or set another template in the recipe: `data.chat_template`",
        ) from error
    if train_on == "last":
        spans, weights = spans[-1:], weights[-1:]
    if len(spans) != len(weights):
        if any("weight" in each for each in messages):
            raise WmtpError(
                f"messages have weights, but the chat template marks {len(spans)} turns for {len(weights)} "
                "messages of the assistant",
                hint="a template that marks each message of the assistant once, or one `weight` a row",
            )
        weights = [1.0] * len(spans)
    learned = range(len(messages)) if train_on == "all" else [len(messages) - 1]
    marks = [
        mark
        for i in learned
        if messages[i].get("weights")
        for mark in _find_spans(tokenizer, shown, tools, number=i, spans=messages[i]["weights"], text=text)
    ]
    return RenderedChat(text=text, spans=tuple(spans), weights=tuple(weights), marks=tuple(marks))


def _find_spans(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Message],
    *,
    number: int,
    spans: Sequence[Span],
    text: str,
) -> list[Span]:
    """Return the spans of message `number` (from 0) in characters of the rendered text.

    A private-use character is inserted at each edge of a span in the message, and the chat is rendered again.
    If the second rendering without private-use characters equals the first rendering, the template does not
    change the message, and the positions of the inserted characters are the edges. If the template strips
    blanks at the ends of a message, edges in these blanks are moved to the start or the end of the stripped
    text.
    """
    content = messages[number]["content"]
    edges = [edge for start, end, _ in spans for edge in (start, end)]
    first, last = len(content) - len(content.lstrip()), len(content.rstrip())
    for moved in (edges, [min(max(edge, first), last) for edge in edges]):
        marked = content
        for i, edge in sorted(enumerate(moved), key=lambda each: -each[1]):
            marked = f"{marked[:edge]}{chr(_MARK + i)}{marked[edge:]}"
        changed = [*messages[:number], {**messages[number], "content": marked}, *messages[number + 1 :]]
        parts = re.split(
            f"([{chr(_MARK)}-{chr(_MARK + len(edges) - 1)}])", _render(tokenizer, changed, tools)
        )
        found = {mark: sum(map(len, parts[: 2 * i + 1 : 2])) for i, mark in enumerate(parts[1::2])}
        if "".join(parts[::2]) == text and len(found) == len(edges) == len(parts) // 2:
            at = [found[chr(_MARK + i)] for i in range(len(edges))]
            return [
                (start, end, weight)
                for start, end, (_, _, weight) in zip(at[::2], at[1::2], spans, strict=True)
            ]
    raise WmtpError(
        f"message {number + 1} has weights of spans, but the chat template changes the text of the message",
        hint="one `weight` a message, or another template in `data.chat_template`",
    )


def _render(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Message], *, prompt: bool = False
) -> str:
    rendered: str = tokenizer.apply_chat_template(
        list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
    )
    return rendered


def _by_marks(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Message], train_on: TrainOn
) -> tuple[str, list[tuple[int, int]]]:
    del train_on  # the template marks all turns; the caller selects the last one if needed
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), (spans,) = render_jinja_template(
        [list(messages)],
        tools=list(tools) or None,
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    if not spans:
        raise WmtpError("the chat template marks no turn of the assistant")
    return text, [(start, end) for start, end in spans]


def _by_prefixes(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Message], train_on: TrainOn
) -> tuple[str, list[tuple[int, int]]]:
    text = _render(tokenizer, messages, tools)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = []
    for i in turns if train_on == "all" else turns[-1:]:
        before = _render(tokenizer, messages[:i], tools, prompt=True)
        after = _render(tokenizer, messages[: i + 1], tools)
        turn = after[len(before) :]
        content = messages[i].get("content") or ""
        if not (text.startswith(after) and after.startswith(before) and content.strip() in turn):
            raise WmtpError(
                f"the chat template changes message {i + 1}, or messages before it, when others follow, so "
                "the tokens of that turn cannot be found",
                hint='data.train_on = "last", or a template with `{% generation %}` in `data.chat_template`',
            )
        end = re.search(f"{control_tokens(tokenizer).pattern}(\\s*)$", turn)
        spans.append((len(before), len(after) - (len(end[2]) if end else 0)))
    return text, spans
