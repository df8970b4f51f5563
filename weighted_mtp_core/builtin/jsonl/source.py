"""The data source over checked rows: splits by problem, and verification where rows bring tests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from weighted_mtp_core.api import (
    DatasetVersion,
    DataSource,
    Example,
    Split,
)
from weighted_mtp_core.builtin.jsonl import JsonlOptions
from weighted_mtp_core.builtin.jsonl.rows import Row, read_rows
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.storage.manifest import sha256_of


class JsonlSource(DataSource):
    """Examples from files, in the files' order."""

    def __init__(self, options: JsonlOptions) -> None:
        files: dict[Split, str | None] = {
            "train": options.train,
            "validation": options.validation,
            "test": options.test,
        }
        named = {split: Path(file) for split, file in files.items() if file is not None}
        if options.path is not None:
            self._files = [Path(options.path)]
            self._rows = _split_by_problem(read_rows(self._files[0]), options)
        else:
            self._files = list(named.values())
            self._rows = {split: read_rows(path) for split, path in named.items()}
            _refuse_shared_problems(self._rows)

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
            for number, row in enumerate(self._rows.get(split, ()))
        ]

    def version(self) -> DatasetVersion:
        """Return the SHA-256 of the files' bytes; the version is its beginning."""
        digest = hashlib.sha256("".join(sha256_of(path) for path in self._files).encode()).hexdigest()
        return DatasetVersion(name=self._files[0].stem, version=digest[:12], sha256=digest)


def _split_by_problem(rows: Sequence[Row], options: JsonlOptions) -> dict[Split, list[Row]]:
    """Send each problem to one split, by a hash of its name, so that new problems move no other."""
    found: dict[Split, list[Row]] = {"train": [], "validation": [], "test": []}
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


def _refuse_shared_problems(rows: Mapping[Split, Sequence[Row]]) -> None:
    """Refuse a problem that is in two splits: what was trained on cannot judge."""
    seen: dict[str, Split] = {}
    for split, members in rows.items():
        for row in members:
            if seen.setdefault(row.problem_id, split) != split:
                raise WmtpError(
                    f"problem `{row.problem_id}` is in both `{seen[row.problem_id]}` and `{split}`",
                    hint="give each problem to one file",
                )
