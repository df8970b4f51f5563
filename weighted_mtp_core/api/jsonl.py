"""A data source over a team's own rows, one JSON object a line: a prompt with a response to it."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from attrs import define, field, frozen
from attrs import validators as v

from weighted_mtp_core.api.data import DatasetVersion, DataSource, Example, Split, is_correct
from weighted_mtp_core.api.datasets import sha256_of_file
from weighted_mtp_core.api.records import ProblemIds, Record, read_records
from weighted_mtp_core.errors import WmtpError
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
_SPELLINGS = {"iscorrect": "is_correct", "correct": "is_correct", "reward": "reward"}


def _check_template(_: object, __: object, template: str | None) -> None:
    if template is None:
        return
    try:
        names = _names(template)
    except ValueError as error:
        raise ValueError(f"cannot be read: {error}; `{{{{` and `}}}}` stand for braces") from error
    if wrong := [name for name in names if not name.isidentifier()]:
        raise ValueError(f"must contain names of keys in braces, such as `{{prompt}}`, got `{{{wrong[0]}}}`")
    if not names:
        raise ValueError("must name a key of the rows in braces, such as `{prompt}`")
    if answer := next((name for name in names if name in {*_RESPONSE_KEYS, *_VERDICT_KEYS}), None):
        raise ValueError(f"must not contain `{{{answer}}}`: the prompt would give the answer away")


def _names(template: str) -> list[str]:
    """Return what stands in braces in a template; ValueError if the braces do not match."""
    parts = string.Formatter().parse(template)
    return [
        f"{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"
        for _, name, spec, conversion in parts
        if name is not None
    ]


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
        seed: Seed of that split.
        template: Layout of the prompt, with keys of the rows in braces: `"Question: {question}"`. By default
            the prompt is the row's `prompt` as it is, or `instruction` and `input` in the Alpaca layout.
    """

    path: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    validation_share: float = field(default=0.1, validator=[v.ge(0), v.lt(1)])
    test_share: float = field(default=0.1, validator=[v.ge(0), v.lt(1)])
    seed: int = field(default=0, validator=v.ge(0))
    template: str | None = field(default=None, validator=_check_template)


@frozen(kw_only=True)
class JsonlRow:
    """A checked row.

    Attributes:
        prompt: The whole prompt, as the policy reads it.
        response: The response.
        problem_id: Shared by the responses to one problem.
        reward: Verified outcome of the response, in [0, 1]; None if the row has no verdict.
        tests: Source that defines `check(candidate)`; empty if the problem cannot be judged.
        entry_point: The function that the tests call.
    """

    prompt: str
    response: str
    problem_id: str
    reward: float | None
    tests: str
    entry_point: str

    @property
    def is_correct(self) -> bool:
        """Whether the response was verified as correct; False without a verdict."""
        return self.reward is not None and is_correct(self.reward)


class JsonlSource(DataSource):
    """Examples from rows, in the order of the files. It reads the rows' `tests`, but does not judge.

    Raises:
        WmtpError: The options name no file, or both kinds; a file cannot be read, or lists its bad lines; one
            id stands for two prompts or two tests, or is in two files; some rows have a verdict and others
            have none.
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
        earlier, parse = _EarlierRows(), partial(_row, template=options.template)
        if options.path is not None:
            self.files = [Path(options.path)]
            self._rows = _split_by_problem(_read(self.files[0], parse, earlier.check), options)
        else:
            self.files = list(named.values())
            self._rows = {
                split: _read(path, parse, partial(earlier.check, split=split))
                for split, path in named.items()
            }

    def rows(self, split: Split) -> Sequence[JsonlRow]:
        """Return the rows of the split."""
        return self._rows.get(split, ())

    def examples(self, split: Split) -> Sequence[Example]:
        """Return every response of the split; without a verdict, its reward is 1."""
        return [
            Example(
                example_id=f"{split}/{number}",
                problem_id=row.problem_id,
                prompt=row.prompt,
                response=row.response,
                reward=1.0 if row.reward is None else row.reward,
            )
            for number, row in enumerate(self.rows(split))
        ]

    def version(self) -> DatasetVersion:
        """Return the SHA-256 of the files' bytes; the version is its beginning."""
        digest = hashlib.sha256("".join(map(sha256_of_file, self.files)).encode()).hexdigest()
        return DatasetVersion(name=self.files[0].stem, version=digest[:12], sha256=digest)


def _read(
    path: Path, parse: Callable[[Record], JsonlRow], check: Callable[[JsonlRow, str], None]
) -> list[JsonlRow]:
    if not path.exists():
        raise WmtpError(f"there is no file `{path}`", hint="paths count from where you start the run")
    return read_records(path, parse, what="line", check=check)


@define
class _EarlierRows:
    """Compares each row with the rows before it, in all files of the source."""

    _ids: ProblemIds = field(factory=ProblemIds, init=False)
    _first: tuple[bool, str] | None = field(default=None, init=False)

    def check(self, row: JsonlRow, place: str, *, split: Split | None = None) -> None:
        """Raise ValueError if the row does not fit; `split` is the split of its file."""
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


def _row(record: Record, *, template: str | None) -> JsonlRow:
    """Check a record; ValueError with its first fault."""
    prompt, response = _prompt(record, template), _response(record)
    for key in ("tests", "entry_point"):
        if not isinstance(record.get(key, ""), str | None):
            raise ValueError(f"`{key}` must be a string, got {type(record[key]).__name__}")  # noqa: TRY004
    reward = _reward(record)
    if not isinstance(record.get("metadata", {}), dict | None):
        raise ValueError("`metadata` must be an object")  # noqa: TRY004
    if record.get("tests") and not record.get("entry_point"):
        raise ValueError("has `tests`, so it needs `entry_point`, the function that they call")
    return JsonlRow(
        prompt=prompt,
        response=response,
        problem_id=_problem_id(record, prompt or response),
        reward=reward,
        tests=record.get("tests") or "",
        entry_point=record.get("entry_point") or "",
    )


def _prompt(record: Record, template: str | None) -> str:
    if template is not None:
        names = _names(template)
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


def _reward(record: Record) -> float | None:
    """Return the verdict, None if there is none; a misspelt key must not make a wrong response correct."""
    for name in record:
        spelt = name.lower().replace("_", "").replace("-", "")
        if name not in _VERDICT_KEYS and (meant := nearest(spelt, _SPELLINGS, cutoff=0.85)):
            raise ValueError(f"has `{name}`: did you mean `{_SPELLINGS[meant[0]]}`?")
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


def _problem_id(record: Record, text: str) -> str:
    """Return the row's id; without one, a hash of `text`, so that equal prompts are one problem."""
    key = next((key for key in ("problem_id", "task_id") if key in record), None)
    if key is None:
        return hashlib.sha256(text.encode()).hexdigest()[:16]
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
