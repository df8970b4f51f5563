"""Provide a data source for a user's own files; a row contains a prompt with one response, or a chat."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from attrs import field, frozen
from attrs import validators as v

from weighted_mtp_core.api.components import BuildContext
from weighted_mtp_core.api.data import DatasetVersion, DataSource, Example, Split
from weighted_mtp_core.api.data_files import data_files
from weighted_mtp_core.api.datasets import sha256_of_file
from weighted_mtp_core.api.jsonl_rows import ANSWERS, EarlierRows, JsonlRow, parse_row, template_names
from weighted_mtp_core.api.records import Record, read_records
from weighted_mtp_core.errors import WmtpError


def _check_template(_: object, __: object, template: str | None) -> None:
    if template is None:
        return
    try:
        names = template_names(template)
    except ValueError as error:
        raise ValueError(f"cannot be read: {error}; `{{{{` and `}}}}` stand for braces") from error
    if wrong := [name for name in names if not name.isidentifier()]:
        raise ValueError(f"must contain names of keys in braces, such as `{{prompt}}`, got `{{{wrong[0]}}}`")
    if not names:
        raise ValueError("must name a key of the rows in braces, such as `{prompt}`")
    if answer := next((name for name in names if name in ANSWERS), None):
        raise ValueError(f"must not contain `{{{answer}}}`: the prompt would give the answer away")


@frozen(kw_only=True)
class RowFiles:
    """The files of a data source: either `path` for all splits, or separate files for some or all splits.

    Each of the options `path`, `train`, `validation` and `test` selects files of JSON lines or parquet. An
    option can be the path of a file, a pattern such as `data/train-*.parquet`, a folder that
    `Dataset.save_to_disk` wrote, or a split on the Hugging Face hub, such as `hub:OWNER/NAME:SPLIT`.

    Attributes:
        path: Files with the rows of all splits. Each problem is assigned to one split.
        train: Files with the rows of the split `train`.
        validation: Files with the rows of the split `validation`.
        test: Files with the rows of the split `test`.
        validation_share: Approximate share of the problems in `path` that the split `validation` gets.
        test_share: Approximate share of the problems in `path` that the split `test` gets.
        seed: Seed for assigning the problems in `path` to splits.
    """

    path: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    validation_share: float = field(default=0.1, validator=[v.ge(0), v.lt(1)])
    test_share: float = field(default=0.1, validator=[v.ge(0), v.lt(1)])
    seed: int = field(default=0, validator=v.ge(0))


@frozen(kw_only=True)
class JsonlOptions(RowFiles):
    """The table `[data.options]` of a data source that reads rows with a prompt and a response.

    Attributes:
        template: Layout of the prompt, with keys of the rows in braces: `"Question: {question}"`. By default,
            the prompt is the row's unchanged `prompt`, or its `instruction` and `input` in the Alpaca layout.
    """

    template: str | None = field(default=None, validator=_check_template)


class JsonlSource(DataSource):
    """Supplies the rows of files as examples, in the order of the files. The `tests` of rows are not run.

    Args:
        options: The options that select the files.
        context: The context in which the source is built.
        parse: Converts a record to a row, as in `read_records`. By default, a record must contain a prompt
            and a response.

    Raises:
        WmtpError: The options contain neither `path` nor files of splits, or contain both; or a file does not
            exist, cannot be fetched or read, has no lines, or has invalid lines (rows of a table), of which
            the message lists up to 20. A line is also invalid if it contradicts earlier lines: if its
            problem has another prompt, other tests or another split, or if only some lines have a verdict. A
            line with a negative weight is invalid unless the context allows negative weights.
    """

    def __init__(
        self, options: RowFiles, context: BuildContext, *, parse: Callable[[Record], JsonlRow] | None = None
    ) -> None:
        files: dict[Split, str | None] = {
            "train": options.train,
            "validation": options.validation,
            "test": options.test,
        }
        named = {split: file for split, file in files.items() if file is not None}
        if (options.path is None) == (not named):
            raise WmtpError(
                "name either one file (`path`) or a file for each split (`train`, `validation`, `test`)",
                hint='for example `path = "data/solutions.jsonl"` in `[data.options]`',
            )
        template = options.template if isinstance(options, JsonlOptions) else None
        earlier, parse = EarlierRows(), parse or partial(parse_row, template=template)

        def check(row: JsonlRow, place: str, *, split: Split | None = None) -> None:
            if not context.negative_weights:
                row.check_signs()
            earlier.check(row, place, split=split)

        def read(text: str, *, split: Split | None = None) -> list[JsonlRow]:
            files = data_files(text, downloads=context.storage / "downloads")
            self.files += files
            checked = partial(check, split=split)
            return [row for path in files for row in read_records(path, parse, check=checked)]

        self.files: list[Path] = []
        if options.path is not None:
            self._rows = _split_by_problem(read(options.path), options)
        else:
            self._rows = {split: read(file, split=split) for split, file in named.items()}

    def rows(self, split: Split) -> Sequence[JsonlRow]:
        """Return the rows of the split."""
        return self._rows.get(split, ())

    def examples(self, split: Split) -> Sequence[Example]:
        """Return all responses of the split as examples; a response without a verdict has the reward 1."""
        return [
            Example(
                example_id=f"{split}/{number}",
                problem_id=row.problem_id,
                prompt=row.prompt,
                response=row.response,
                reward=1.0 if row.reward is None else row.reward,
                weight=row.weight,
                spans=row.spans,
                messages=row.messages,
                tools=row.tools,
                metadata=row.metadata,
            )
            for number, row in enumerate(self.rows(split))
        ]

    def version(self) -> DatasetVersion:
        """Return the version of the data.

        In the result, `name` is the name of the first file without its last suffix or, if this suffix is
        `.arrow`, the name of the folder that contains the file. `sha256` changes if any byte of the files
        changes, and `version` consists of the first 12 digits of `sha256`.
        """
        digest = hashlib.sha256("".join(map(sha256_of_file, self.files)).encode()).hexdigest()
        first = self.files[0]
        name = first.parent.name if first.suffix == ".arrow" else first.stem
        return DatasetVersion(name=name, version=digest[:12], sha256=digest)


def _split_by_problem(rows: Sequence[JsonlRow], options: RowFiles) -> dict[Split, list[JsonlRow]]:
    """Assign each problem to a split by a hash of its id, so that new problems do not move existing ones."""
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
