"""Read the problems of CodeContests from the public files of the data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen
from weighted_mtp_core.api import (
    Problem,
    ProblemIds,
    Record,
    Split,
    WmtpError,
    read_records,
    text_field,
    text_list_field,
)

from weighted_mtp_code_tasks.labelling import Candidate, LabelledProblem, Made

FORMAT = 1
"""Part of the version of the data; raise it if the code makes other programs from the same files."""

_PYTHON_3 = (3, "PYTHON3")  # the number of the language in `.parquet` files, and its name in JSON
_LONGEST_CASE = 100_000  # characters; generated tests may be megabytes long


@frozen(kw_only=True)
class Limits:
    """The options of `code_tasks.code_contests` that limit the numbers of problems, tests and programs."""

    problems: int
    cases: int
    solutions: int
    incorrect: int

    def as_dict(self) -> dict[str, int]:
        """Return the limits by name."""
        return attrs.asdict(self)


def read_problems(files: Mapping[Split, Sequence[Path]], limits: Limits) -> list[LabelledProblem]:
    """Return the problems that have tests and a solution in Python 3, and that use stdin and stdout.

    At most the first `limits.problems` of each split are returned, or all of them if this limit is 0.

    Raises:
        WmtpError: A file is missing or malformed, two problems with the same name have different descriptions
            or splits, or no problem has tests and a solution in Python 3 and uses stdin and stdout.
    """
    found: dict[str, LabelledProblem] = {}
    ids = ProblemIds()

    def check(row: LabelledProblem | None, place: str) -> None:
        if row is not None:
            ids.add(row.problem.problem_id, place, prompt=row.problem.prompt, split=row.split)

    for split, paths in files.items():
        parse = partial(_problem, split=split, limits=limits)
        rows = [row for path in paths for row in read_records(path, parse, check=check) if row is not None]
        for row in rows[: limits.problems or None]:
            found.setdefault(row.problem.problem_id, row)
    if not found:
        raise WmtpError("no problem has tests and a solution in Python 3 that reads stdin")
    return list(found.values())


def _problem(record: Record, *, split: Split, limits: Limits) -> LabelledProblem | None:
    name, description = text_field(record, "name"), text_field(record, "description")
    cases = _cases(record)[: limits.cases]
    solutions = _programs(record, "solutions")[: limits.solutions]
    if not cases or not solutions or record.get("input_file") or record.get("output_file"):
        return None
    incorrect = [each for each in _programs(record, "incorrect_solutions") if each not in solutions]
    return LabelledProblem(
        problem=Problem(
            problem_id=f"code_contests/{name}",
            prompt=f'"""\n{_docstring(description)}\n"""\n',
            entry_point="",
            tests=json.dumps(cases, ensure_ascii=False),
            solution=solutions[0],
        ),
        split=split,
        candidates=(
            *_candidates(solutions, "solution"),
            *_candidates(incorrect[: limits.incorrect], "sample"),
        ),
    )


def _candidates(programs: Sequence[str], made: Made) -> list[Candidate]:
    return [Candidate(response=each, made=made) for each in programs]


def _docstring(description: str) -> str:
    return description.strip().replace('"""', "'''")


def _cases(record: Record) -> list[tuple[str, str]]:
    """Return the pairs of stdin and stdout of all tests that are not longer than `_LONGEST_CASE`."""
    found = []
    for key in ("public_tests", "private_tests", "generated_tests"):
        tests = _table(record, key)
        given, expected = text_list_field(tests, "input"), text_list_field(tests, "output")
        if len(given) != len(expected):
            raise ValueError(f"`{key}` has {len(given)} inputs and {len(expected)} outputs")
        found += list(zip(given, expected, strict=True))
    return [case for case in found if len(case[0]) + len(case[1]) <= _LONGEST_CASE]


def _programs(record: Record, key: str) -> list[str]:
    """Return the distinct programs in Python 3, in the order of their hashes, which is arbitrary."""
    programs = _table(record, key)
    languages, sources = programs.get("language"), text_list_field(programs, "solution")
    if not isinstance(languages, list) or len(languages) != len(sources):
        raise ValueError(f"`{key}` needs a `language` for each `solution`")
    chosen = {
        source.rstrip() + "\n"
        for language, source in zip(languages, sources, strict=True)
        if language in _PYTHON_3 and source.strip()
    }
    return sorted(chosen, key=lambda source: hashlib.sha256(source.encode("utf-8", "replace")).digest())


def _table(record: Record, key: str) -> Mapping[str, Any]:
    value = record.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"needs `{key}`, an object of lists")  # noqa: TRY004 - a fault of the file
    return value
