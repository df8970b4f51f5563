"""One line of a team's file: its keys, its checks, and the prompt it becomes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from weighted_mtp_core.api.records import refuse_faults
from weighted_mtp_core.errors import WmtpError

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


@frozen(kw_only=True)
class Row:
    """A checked line.

    Attributes:
        instruction: What is asked.
        input: What it is asked about; may be empty.
        output: The response.
        problem_id: Shared by responses to one problem.
        is_correct: Whether the response was verified as right.
        tests: Source that defines `check(candidate)`; empty if the problem cannot be judged.
        entry_point: The function that the tests call.
    """

    instruction: str
    input: str
    output: str
    problem_id: str
    is_correct: bool
    tests: str
    entry_point: str

    @property
    def prompt(self) -> str:
        """The Alpaca prompt."""
        template = _WITH_INPUT if self.input else _WITHOUT_INPUT
        return template.format(instruction=self.instruction, input=self.input)


def read_rows(path: Path) -> list[Row]:
    """Read a file, one JSON object a line; empty lines are passed over.

    Raises:
        WmtpError: The file is missing or empty, or lists every bad line (the first 20) with its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # texts may hold other line separators
    except FileNotFoundError as error:
        raise WmtpError(
            f"there is no file `{path}`", hint="paths count from where you start the run"
        ) from error
    except UnicodeDecodeError as error:
        raise WmtpError(f"`{path}` is not UTF-8: {error.reason} at byte {error.start}") from error
    rows: list[Row] = []
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row, fault = _row(line)
        if row is None:
            faults.append(f"  line {number}: {fault}")
        else:
            rows.append(row)
    refuse_faults(path, faults, what="line")
    if not rows:
        raise WmtpError(f"`{path}` has no examples")
    return rows


def _row(line: str) -> tuple[Row | None, str]:
    """Return the row, or what is wrong with the line."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} at column {error.colno}"
    if not isinstance(value, dict):
        return None, f"expected an object, got {type(value).__name__}"
    problem_id = value.get("problem_id", value.get("task_id"))
    if not isinstance(problem_id, str | int) or isinstance(problem_id, bool):
        return None, "needs `problem_id` (or `task_id`), a string or a number"
    fault = _type_fault(value)
    if fault:
        return None, fault
    return (
        Row(
            instruction=value["instruction"],
            input=value.get("input") or "",
            output=value["output"],
            problem_id=str(problem_id),
            is_correct=value["is_correct"],
            tests=value.get("tests") or "",
            entry_point=value.get("entry_point") or "",
        ),
        "",
    )


def _type_fault(value: Mapping[str, Any]) -> str:
    """Return the first fault of an object's keys, or nothing."""
    for key in ("instruction", "output"):
        if not isinstance(value.get(key), str) or not value[key]:
            return f"needs `{key}`, a string that is not empty"
    for key in ("input", "tests", "entry_point"):
        if not isinstance(value.get(key, ""), str | None):
            return f"`{key}` must be a string, got {type(value[key]).__name__}"
    if not isinstance(value.get("is_correct"), bool):
        return "needs `is_correct`, true or false"
    if not isinstance(value.get("metadata", {}), dict | None):
        return "`metadata` must be an object"
    if value.get("tests") and not value.get("entry_point"):
        return "has `tests`, so it needs `entry_point`, the function that they call"
    return ""
