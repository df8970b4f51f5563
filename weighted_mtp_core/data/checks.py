"""Check a data source before anything is trained, and warn about suspicious examples.

The checks read all examples and problems. The warnings are stored with the data, and later runs reuse the
stored warnings as long as version, options and source code of the data source stay the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TypeVar

from attrs import define, field

from weighted_mtp_core.api import SPLITS, DatasetVersion, DataSource, Example, Problem, Split, is_correct
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.identifiers import check_path
from weighted_mtp_core.messages import quoted
from weighted_mtp_core.plugins.selection import SelectedComponent
from weighted_mtp_core.plugins.source_identity import source_identity
from weighted_mtp_core.storage.manifest import DERIVED, MANIFEST, atomic_folder

_NAMED = 5
RowT = TypeVar("RowT")
_FILE = "warnings.json"


def checked_version(source: DataSource, data: SelectedComponent) -> DatasetVersion:
    """Return the version of the data.

    Raises:
        WmtpError: The source raised an exception or did not return a `DatasetVersion`, the `name` or
            `version` is not a valid folder name, or the `sha256` is not a SHA-256.
    """
    with data.blamed("`version`"):
        version = source.version()
        if not isinstance(version, DatasetVersion):
            raise WmtpError(f"returned {type(version).__name__}, expected a `DatasetVersion`")
        try:
            check_path(version.name)
            check_path(version.version)
        except (ValueError, TypeError, AttributeError) as error:
            raise WmtpError(f"returned a version that cannot name a folder: {error}") from error
        if not isinstance(version.sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", version.sha256):
            raise WmtpError(
                f"returned the `sha256` {version.sha256!r}, expected 64 hexadecimal digits",
                hint="it identifies cached tokens and results: hash all bytes that the examples depend on",
            )
    return version


def derived_folder(storage: Path, version: DatasetVersion) -> Path:
    """Return the folder for files that are derived from a version of the data, such as tokens."""
    return storage / "datasets_v2" / version.name / version.version / DERIVED


def data_key(version: DatasetVersion, data: SelectedComponent) -> str:
    """Return a SHA-256 of everything that the examples depend on."""
    source = [data.address, source_identity(data.plugins), data.plain_options()]
    return sha256(json.dumps([version.sha256, source], sort_keys=True).encode()).hexdigest()


def check_examples(
    source: DataSource, version: DatasetVersion, data: SelectedComponent, *, storage: Path
) -> list[str]:
    """Check the examples and problems of all splits; return warnings about them.

    Args:
        source: The data source.
        version: Version of the data. If this version was checked before with the same options and source code
            of the data source, the stored warnings are returned.
        data: The component of the data source, with its options and source code.
        storage: The storage root.

    Raises:
        WmtpError: Two examples or two problems have the same id, a problem is in two splits or has two
            different prompts, or the source raises an exception or yields an object that is not an `Example`
            or `Problem`. The error message names the plugin.
    """
    folder = derived_folder(storage, version) / f"checks-{data_key(version, data)[:12]}"
    if not (folder / MANIFEST).is_file():
        found = _Examples()
        for split in SPLITS:
            with data.blamed(f"split `{split}`"):
                found.read(source, split)
        with atomic_folder(folder) as temporary:
            (temporary / _FILE).write_text(json.dumps(found.warnings()), encoding="utf-8")
    warnings: list[str] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    return [f"WARNING: data source `{data.address}`: {warning}" for warning in warnings]


@define
class _Examples:
    """Ids, prompts and labels of the examples that have been read so far; texts are stored as hashes."""

    ids: set[str] = field(factory=set)
    splits: dict[str, Split] = field(factory=dict)
    prompts: dict[str, tuple[bytes, str]] = field(factory=dict)
    labels: dict[bytes, tuple[bool, str]] = field(factory=dict)
    blank: list[str] = field(factory=list)
    contradicting: list[str] = field(factory=list)

    def read(self, source: DataSource, split: Split) -> None:
        """Check the examples and problems of a split."""
        for example in _all(source.examples(split), Example):
            if example.example_id in self.ids:
                raise WmtpError(f"two examples have the id `{example.example_id}`")
            self.ids.add(example.example_id)
            self._check_problem(example, split)
            self._note_text(example)
        for example in _all(source.policy_examples(split), Example):
            self._check_problem(example, split)
        problems: set[str] = set()
        for problem in _all(source.problems(split), Problem):
            if problem.problem_id in problems:
                raise WmtpError(f"two problems have the id `{problem.problem_id}`")
            problems.add(problem.problem_id)
            self._check_split(problem.problem_id, split)

    def _check_problem(self, example: Example, split: Split) -> None:
        self._check_split(example.problem_id, split)
        prompt = _hash(example.prompt)
        first, named = self.prompts.setdefault(example.problem_id, (prompt, example.example_id))
        if first != prompt:
            raise WmtpError(
                f"problem `{example.problem_id}` has different prompts in the examples `{named}` and "
                f"`{example.example_id}`",
                hint="give each problem an id of its own",
            )

    def _check_split(self, problem_id: str, split: Split) -> None:
        first = self.splits.setdefault(problem_id, split)
        if first != split:
            raise WmtpError(
                f"problem `{problem_id}` is in both `{first}` and `{split}`",
                hint="evaluation on a training problem is meaningless: put each problem in one split",
            )

    def _note_text(self, example: Example) -> None:
        if not example.response.strip():
            self.blank.append(example.example_id)
        right = bool(is_correct(example.reward))
        label, named = self.labels.setdefault(
            _hash(example.problem_id, example.response), (right, example.example_id)
        )
        if label != right:
            self.contradicting += [named, example.example_id]

    def warnings(self) -> list[str]:
        """Return warnings about possible faults of the data."""
        found = []
        if self.blank:
            found.append(f"{len(self.blank)} responses are blank: {_some(self.blank)}")
        if both := list(dict.fromkeys(self.contradicting)):
            found.append(f"{len(both)} examples have the text of one with another label: {_some(both)}")
        return found


def _all(rows: Sequence[RowT], kind: type[RowT]) -> Iterator[RowT]:
    for number, row in enumerate(rows):
        if not isinstance(row, kind):
            raise WmtpError(
                f"item {number} is of the type `{type(row).__name__}`, expected `{kind.__name__}`"
            )
        yield row


def _hash(*texts: str) -> bytes:
    digest = blake2b(digest_size=16)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.digest()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return quoted(names[:_NAMED]) + more
