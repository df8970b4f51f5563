"""The data source `core.chat`, which reads a user's own chats: rows with the key `messages`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from weighted_mtp_core.api import (
    BuildContext,
    DataSource,
    JsonlRow,
    JsonlSource,
    Record,
    RowFiles,
    checked_row,
)
from weighted_mtp_core.api.data import check_message_weights
from weighted_mtp_core.api.jsonl_rows import parse_spans, refuse_misspelt

_ROLES = ("system", "user", "assistant", "tool")


def build_chat(options: RowFiles, context: BuildContext) -> DataSource:
    """Build the data source `core.chat`, which reads and checks every row of its files.

    Raises:
        WmtpError: The options contradict each other, or a file cannot be read or has invalid rows (see
            `JsonlSource`).
    """
    return JsonlSource(options, context, parse=_row)


def _row(record: Record) -> JsonlRow:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("needs `messages`, a list that is not empty")
    checked = tuple(_message(each, number) for number, each in enumerate(messages, start=1))
    if checked[-1]["role"] != "assistant":
        raise ValueError(f"the last message is of the role `{checked[-1]['role']}`, expected `assistant`")
    for key, instead in (("tests", "rows of `core.jsonl`"), ("weights", "a message of a chat")):
        if record.get(key):
            raise ValueError(f"`{key}` is for {instead}, not for a whole chat")
    tools = record.get("tools") or []
    if not isinstance(tools, list) or any(not isinstance(tool, dict) for tool in tools):
        raise ValueError("`tools` must be a list of objects")
    *before, last = (_described(each) for each in checked)
    return checked_row(
        record,
        prompt="".join(f"{text}\n" for text in before),
        response=last,
        messages=checked,
        tools=tuple(tools),
    )


def _message(message: object, number: int) -> Mapping[str, Any]:
    """Return a message after all checks, with its text parts joined; raises ValueError for a fault."""
    if not isinstance(message, dict):
        raise ValueError(f"message {number} must be an object, got {type(message).__name__}")  # noqa: TRY004
    if message.get("role") not in _ROLES:
        raise ValueError(
            f"message {number} has the role {json.dumps(message.get('role'))}, expected one of "
            + ", ".join(f"`{role}`" for role in _ROLES)
        )
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    if not (isinstance(content, str) or (content is None and calls and message["role"] == "assistant")):
        raise ValueError(f"message {number} needs `content`, a string or a list of parts of text")
    if message["role"] == "assistant" and not content and not calls:
        raise ValueError(f"message {number} of the assistant is empty")
    checked = {**message, "content": content or ""}
    try:
        refuse_misspelt(message, {"weight": "weight", "weights": "weights"})
        spans = parse_spans(message, text=checked["content"])
    except ValueError as error:
        raise ValueError(f"message {number}: {error}") from error
    if spans is not None:
        checked["weights"] = spans
    check_message_weights(checked, number)
    return checked


def _part(part: object, number: int) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(
            f'message {number} has a part that is not text: expected {{"type": "text", "text": "..."}}'
        )
    text: str = part["text"]
    return text


def _described(message: Mapping[str, Any]) -> str:
    """Return a message as text: role, content and calls of tools, without the role for the assistant."""
    text = message["content"] + (json.dumps(message["tool_calls"]) if message.get("tool_calls") else "")
    return text if message["role"] == "assistant" else f"{message['role']}: {text}"
