"""Convert the rows of a user's own JSONL or parquet files, and check the keys and values of each row."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping
from typing import Any

from attrs import define, field, frozen

from weighted_mtp_core.api.data import Span, Split, check_spans, check_weight, is_correct
from weighted_mtp_core.api.records import ProblemIds, Record
from weighted_mtp_core.messages import nearest

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_RESPONSE_KEYS = ("response", "output")
_VERDICT_KEYS = ("is_correct", "reward")
ANSWERS = frozenset({*_RESPONSE_KEYS, *_VERDICT_KEYS})
"""Keys of a row with values that must not be part of a prompt, because they give the answer away."""
_SPELLINGS = {
    "iscorrect": "is_correct",
    "correct": "is_correct",
    "passed": "is_correct",  # the key in the results of HumanEval's evaluation
    "reward": "reward",
    "weight": "weight",
    "weights": "weights",
}


@frozen(kw_only=True)
class JsonlRow:
    """One row of a file, after all checks.

    Attributes:
        prompt: The whole prompt, exactly as the policy reads it. For a chat, of which the policy reads only
            `messages`, all messages before the last one as lines such as `user: ...`.
        response: The response. For a chat, the last message as text.
        problem_id: Id of the problem, shared by all responses to it.
        reward: Verified outcome of the response, in [0, 1]; None if the row has no verdict.
        tests: Python source that defines `check(candidate)`; empty if completions cannot be verified.
        entry_point: Name of the function that the tests call; may be empty if there are no tests.
        weight: Weight of each token of the response, as in `Example.weight`.
        spans: Weights of parts of the response, as in `Example.spans`; in a file, their key is `weights`.
        messages: The chat that the policy reads instead of `prompt` and `response`, as in `Example.messages`;
            empty if the row is not a chat.
        tools: Descriptions of tools for the template of a chat.
        metadata: Other data about the response by key; only strings and numbers are kept.
    """

    prompt: str
    response: str
    problem_id: str
    reward: float | None
    tests: str
    entry_point: str
    weight: float | None = None
    spans: tuple[Span, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    metadata: Mapping[str, str | float] = field(factory=dict)

    def check_signs(self) -> None:
        """Raise ValueError if a weight of the row is negative."""
        given = [("", self.weight, self.spans)]
        given += [
            (f" of message {number}", message.get("weight"), message.get("weights"))
            for number, message in enumerate(self.messages, start=1)
        ]
        for of, weight, spans in given:
            names = {f"the weight of the span {list(span)}{of}": span[2] for span in spans or ()}
            names[f"`weight` {weight}{of}"] = 0.0 if weight is None else weight
            for name, value in names.items():
                if value < 0:
                    raise ValueError(f"{name} is negative: `loss.negative_weights = true` allows it")

    @property
    def is_correct(self) -> bool:
        """Whether the response was verified as correct; False if the row has no verdict."""
        return self.reward is not None and is_correct(self.reward)


@define
class EarlierRows:
    """Compares each row of a data source with all earlier rows of its files."""

    _ids: ProblemIds = field(factory=ProblemIds, init=False)
    _first: tuple[bool, str] | None = field(default=None, init=False)

    def check(self, row: JsonlRow, place: str, *, split: Split | None = None) -> None:
        """Raise ValueError if the row contradicts an earlier row.

        Args:
            row: The row.
            place: Place of the row, as `read_records` passes it to `check`.
            split: The split of the row's file; None if the file contains rows of all splits.
        """
        tests = (row.tests, row.entry_point) if row.tests else None
        self._ids.add(row.problem_id, place, prompt=row.prompt, tests=tests, split=split)
        has_verdict = row.reward is not None
        self._first = self._first or (has_verdict, place)
        if has_verdict != self._first[0]:
            this, that = ("has a", "has none") if has_verdict else ("has no", "has one")
            raise ValueError(
                f"{this} verdict (`is_correct` or `reward`), but {self._first[1]} {that}: "
                "give a verdict to all rows or to none"
            )


def template_names(template: str) -> list[str]:
    """Return the names that a template contains in braces; raises ValueError if braces do not match."""
    parts = string.Formatter().parse(template)
    return [
        f"{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"
        for _, name, spec, conversion in parts
        if name is not None
    ]


def parse_row(record: Record, *, template: str | None) -> JsonlRow:
    """Convert a record with a prompt and a response to a row; raises ValueError for the first fault."""
    prompt, response = _prompt(record, template), _response(record)
    return checked_row(record, prompt=prompt, response=response, spans=parse_spans(record, text=response))


def checked_row(
    record: Record,
    *,
    prompt: str,
    response: str,
    spans: tuple[Span, ...] | None = None,
    messages: tuple[Mapping[str, Any], ...] = (),
    tools: tuple[Mapping[str, Any], ...] = (),
) -> JsonlRow:
    """Check the keys that rows with a prompt and rows with a chat have in common, and return the row.

    Args:
        record: The row as read from a file.
        prompt: The whole prompt, or the text of a chat in the form of `JsonlRow.prompt`.
        response: The response, or the last message of a chat as text.
        spans: Weights of parts of the response, as in `Example.spans`.
        messages: A chat, as in `Example.messages`.
        tools: Descriptions of tools for the template of a chat.

    Raises:
        ValueError: A key is misspelt, or a value is invalid; only the first fault is reported.
    """
    refuse_misspelt(record, _SPELLINGS)
    for key in ("tests", "entry_point"):
        if not isinstance(record.get(key, ""), str | None):
            raise ValueError(f"`{key}` must be a string, got {type(record[key]).__name__}")  # noqa: TRY004
    reward = _reward(record)
    metadata = _metadata(record)
    if record.get("tests") and not record.get("entry_point"):
        raise ValueError("has `tests`, so it needs `entry_point`, the function that they call")
    return JsonlRow(
        prompt=prompt,
        response=response,
        problem_id=_problem_id(record, prompt or response),
        reward=reward,
        tests=record.get("tests") or "",
        entry_point=record.get("entry_point") or "",
        weight=_weight(record),
        spans=spans,
        messages=messages,
        tools=tools,
        metadata=metadata,
    )


def _prompt(record: Record, template: str | None) -> str:
    if template is not None:
        names = template_names(template)
        for name in names:
            if not isinstance(record.get(name), str):
                raise ValueError(f"needs `{name}`, a string, for `data.options.template`")  # noqa: TRY004
        return template.format_map({name: record[name] for name in names})
    if "prompt" in record:
        if "instruction" in record:
            raise ValueError("has both `prompt` and `instruction`: choose with `data.options.template`")
        if not isinstance(record["prompt"], str):
            raise ValueError(f"`prompt` must be a string, got {type(record['prompt']).__name__}")
        return record["prompt"]
    if not isinstance(record.get("instruction"), str) or not record["instruction"]:
        name = "`instruction`" if "instruction" in record else "`prompt` or `instruction`"
        raise ValueError(f"needs {name}, a string that is not empty")
    if not isinstance(record.get("input", ""), str | None):
        raise ValueError(f"`input` must be a string, got {type(record['input']).__name__}")  # noqa: TRY004
    layout = _WITH_INPUT if record.get("input") else _WITHOUT_INPUT
    return layout.format(instruction=record["instruction"], input=record.get("input"))


def _response(record: Record) -> str:
    key, *others = [key for key in _RESPONSE_KEYS if key in record] or ["response` or `output"]
    if others:
        raise ValueError("has both `response` and `output`: remove one")
    response = record.get(key)
    if not isinstance(response, str) or not response:
        raise ValueError(f"needs `{key}`, a string that is not empty")
    return response


def refuse_misspelt(record: Record, keys: Mapping[str, str]) -> None:
    """Refuse misspelt optional keys, because a row without these keys counts as correct and has weight 1.

    Args:
        record: A row or a message.
        keys: The optional keys, each indexed by one or more spellings in lower case without `_` and `-`; a
            spelling may also be another name for the key.

    Raises:
        ValueError: A key of the record is not one of the optional keys, but equals or resembles one of the
            spellings.
    """
    for name in record:
        spelt = name.lower().replace("_", "").replace("-", "")
        if name not in keys.values() and (meant := nearest(spelt, keys, cutoff=0.85)):
            raise ValueError(f"has `{name}`: did you mean `{keys[meant[0]]}`?")


def _reward(record: Record) -> float | None:
    """Return the verdict as a reward, or None if the row has no verdict."""
    if "is_correct" in record:
        if "reward" in record:
            raise ValueError("has both `is_correct` and `reward`: remove one")
        if not isinstance(record["is_correct"], bool):
            raise ValueError("needs `is_correct`, true or false")
        return float(record["is_correct"])
    if "reward" not in record:
        return None
    value = record["reward"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"`reward` must be a number from 0 to 1, got {json.dumps(value)}")
    return float(value)


def _weight(record: Record) -> float | None:
    if "weight" not in record:
        return None
    check_weight(record["weight"], "`weight`")
    return float(record["weight"])


def _metadata(record: Record) -> dict[str, str | float]:
    metadata = record.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ValueError("`metadata` must be an object")  # noqa: TRY004
    return {
        key: value
        for key, value in metadata.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool)
    }


def parse_spans(record: Record, *, text: str) -> tuple[Span, ...] | None:
    """Return the spans under the record's key `weights`, or None if the record does not have this key.

    Args:
        record: A row or a message.
        text: The text to which the spans belong.

    Raises:
        ValueError: The value is not a list of [start, end, weight], a span does not fit `text`, or spans
            overlap.
    """
    if "weights" not in record:
        return None
    rows = record["weights"]
    if not isinstance(rows, list) or any(not _is_span(row) for row in rows):
        raise ValueError("`weights` must be a list of [start, end, weight]; start and end count characters")
    spans = tuple((int(start), int(end), weight) for start, end, weight in rows)
    check_spans(spans, length=len(text))
    return spans


def _is_span(row: object) -> bool:
    """Return whether `row` is [start, end, weight]; in parquet files, start and end may be whole floats."""
    if not isinstance(row, list) or len(row) != 3 or any(type(each) not in {int, float} for each in row):
        return False
    return all(isinstance(edge, int) or edge.is_integer() for edge in row[:2])


def _problem_id(record: Record, text: str) -> str:
    """Return the problem id of a row, or a hash of `text` if the row has no id.

    If `text` is the prompt, rows that have no ids but the same prompt are responses to one problem.
    """
    key = next((key for key in ("problem_id", "task_id") if key in record), None)
    if key is None:
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    value = record[key]
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise ValueError(f"`{key}` must be a string or a whole number, got {json.dumps(value)}")
    return str(value)
