"""A data source over a team's own rows, one JSON object a line, in the Alpaca layout (Taori et al. 2023)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from attrs import field, frozen
from attrs import validators as v

from weighted_mtp_core.api.data import DatasetVersion, DataSource, Example, Split
from weighted_mtp_core.api.datasets import sha256_of_file
from weighted_mtp_core.api.records import ProblemIds, Record, read_records
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
class JsonlOptions:
    """`[data.options]` of a data source over rows: either `path`, or a file a split.

    Attributes:
        path: One file, split by problem.
        train: File of the split `train`.
        validation: File of the split `validation`.
        test: File of the split `test`.
        validation_share: Share of the problems in `path` that go to the split `validation`.
        test_share: Share of the problems in `path` that go to the split `test`.
        seed: Of that split.
    """

    path: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    validation_share: float = field(default=0.1, validator=[v.ge(0), v.lt(1)])
    test_share: float = field(default=0.1, validator=[v.ge(0), v.lt(1)])
    seed: int = field(default=0, validator=v.ge(0))


@frozen(kw_only=True)
class JsonlRow:
    """A checked row.

    Attributes:
        instruction: The task.
        input: What the task is about; may be empty.
        output: The response.
        problem_id: Shared by the responses to one problem.
        is_correct: Whether the response was verified as correct.
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


class JsonlSource(DataSource):
    """Examples from rows, in the order of the files. Knows the rows' `tests`, but does not judge.

    Raises:
        WmtpError: The options name no file, or both kinds; a file cannot be read, or lists its bad lines; one
            id stands for two prompts or two tests, or is in two files.
    """

    def __init__(self, options: JsonlOptions) -> None:
        files: dict[Split, str | None] = {
            "train": options.train,
            "validation": options.validation,
            "test": options.test,
        }
        named = {split: Path(file) for split, file in files.items() if file is not None}
        if (options.path is None) == (not named):
            raise WmtpError(
                "name either one file (`path`) or a file for each split (`train`, `validation`, `test`)",
                hint='for example `path = "data/solutions.jsonl"` in `[data.options]`',
            )
        ids = ProblemIds()
        if options.path is not None:
            self.files = [Path(options.path)]
            self._rows = _split_by_problem(_read(self.files[0], _check(ids)), options)
        else:
            self.files = list(named.values())
            self._rows = {split: _read(path, _check(ids, split)) for split, path in named.items()}

    def rows(self, split: Split) -> Sequence[JsonlRow]:
        """Return the rows of the split."""
        return self._rows.get(split, ())

    def examples(self, split: Split) -> Sequence[Example]:
        """Return every response of the split; `is_correct` is its reward."""
        return [
            Example(
                example_id=f"{split}/{number}",
                problem_id=row.problem_id,
                prompt=row.prompt,
                response=row.output,
                reward=1.0 if row.is_correct else 0.0,
            )
            for number, row in enumerate(self.rows(split))
        ]

    def version(self) -> DatasetVersion:
        """Return the SHA-256 of the files' bytes; the version is its beginning."""
        digest = hashlib.sha256("".join(map(sha256_of_file, self.files)).encode()).hexdigest()
        return DatasetVersion(name=self.files[0].stem, version=digest[:12], sha256=digest)


def _read(path: Path, check: Callable[[JsonlRow, str], None]) -> list[JsonlRow]:
    if not path.exists():
        raise WmtpError(f"there is no file `{path}`", hint="paths count from where you start the run")
    return read_records(path, _row, what="line", check=check)


def _check(ids: ProblemIds, split: Split | None = None) -> Callable[[JsonlRow, str], None]:
    """Return the comparison of a row with earlier rows of its problem; `split` is that of the file."""

    def check(row: JsonlRow, place: str) -> None:
        tests = (row.tests, row.entry_point) if row.tests else None
        ids.add(row.problem_id, place, prompt=(row.instruction, row.input), tests=tests, split=split)

    return check


def _row(record: Record) -> JsonlRow:
    """Check a record; ValueError with its first fault."""
    problem_id = _problem_id(record)
    for key in ("instruction", "output"):
        if not isinstance(record.get(key), str) or not record[key]:
            raise ValueError(f"needs `{key}`, a string that is not empty")
    for key in ("input", "tests", "entry_point"):
        if not isinstance(record.get(key, ""), str | None):
            raise ValueError(f"`{key}` must be a string, got {type(record[key]).__name__}")  # noqa: TRY004
    if not isinstance(record.get("is_correct"), bool):
        raise ValueError("needs `is_correct`, true or false")  # noqa: TRY004
    if not isinstance(record.get("metadata", {}), dict | None):
        raise ValueError("`metadata` must be an object")  # noqa: TRY004
    if record.get("tests") and not record.get("entry_point"):
        raise ValueError("has `tests`, so it needs `entry_point`, the function that they call")
    return JsonlRow(
        instruction=record["instruction"],
        input=record.get("input") or "",
        output=record["output"],
        problem_id=problem_id,
        is_correct=record["is_correct"],
        tests=record.get("tests") or "",
        entry_point=record.get("entry_point") or "",
    )


def _problem_id(record: Record) -> str:
    key = next((key for key in ("problem_id", "task_id") if key in record), None)
    if key is None:
        raise ValueError("needs `problem_id` (or `task_id`), a string or a whole number")
    value = record[key]
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise ValueError(f"`{key}` must be a string or a whole number, got {json.dumps(value)}")
    return str(value)


def _split_by_problem(rows: Sequence[JsonlRow], options: JsonlOptions) -> dict[Split, list[JsonlRow]]:
    """Give each problem to one split, by a hash of its name, so that new problems move no other."""
    found: dict[Split, list[JsonlRow]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        digest = hashlib.sha256(f"{options.seed}/{row.problem_id}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        if share < options.test_share:
            found["test"].append(row)
        elif share < options.test_share + options.validation_share:
            found["validation"].append(row)
        else:
            found["train"].append(row)
    return found
