"""Renders chats as texts with the tokenizer's template, and marks the turns that the policy learns.

A template with `{% generation %}` marks the assistant's turns itself. Without these marks, a turn is the text
that is added when the chat up to this turn is rendered instead of the previous messages with the generation
prompt. This is correct only if the template neither drops nor reorders text, which is checked against the
whole rendering.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from attrs import frozen

from weighted_mtp_core.errors import WmtpError

TrainOn = Literal["all", "last"]
Message = Mapping[str, Any]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@frozen(kw_only=True)
class RenderedChat:
    """A chat as text.

    Attributes:
        text: The text of the chat, including the spelling of control tokens.
        spans: (start, end) of each learned turn, in characters.
        weights: Weight of each learned turn.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]

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
        messages: The messages as the template reads them; the last one is the assistant's. The template does
            not see the `weight` of a message.
        tools: Descriptions of tools for the template.
        train_on: Whether all turns of the assistant are learned, or the last one.

    Raises:
        WmtpError: There is no template, or the turns cannot be found in what it renders.
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
    shown = [{key: value for key, value in each.items() if key != "weight"} for each in messages]
    find = _by_marks if _GENERATION.search(tokenizer.chat_template) else _by_prefixes
    text, spans = find(tokenizer, shown, tools, train_on)
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
    return RenderedChat(text=text, spans=tuple(spans), weights=tuple(weights))


def _by_marks(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Message], train_on: TrainOn
) -> tuple[str, list[tuple[int, int]]]:
    del train_on  # all turns are marked
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
    def render(count: int, *, prompt: bool) -> str:
        rendered: str = tokenizer.apply_chat_template(
            list(messages[:count]), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
        )
        return rendered

    text = render(len(messages), prompt=False)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = []
    for i in turns if train_on == "all" else turns[-1:]:
        before, after = render(i, prompt=True), render(i + 1, prompt=False)
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
