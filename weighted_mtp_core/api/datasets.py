"""Data sets that a data source makes itself: written once under the storage root, verified when read."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from weighted_mtp_core.api.data import DatasetVersion, Example
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.storage.manifest import MANIFEST, atomic_folder, sha256_of, verify_manifest
from weighted_mtp_core.storage.versions import dataset_folder

DIFFICULTIES = ("0-20 %", "20-40 %", "40-60 %", "60-80 %", "80-100 %")
"""Bins of a problem's share of correct responses, hard problems first; the last includes 100 %."""


@frozen(kw_only=True)
class StoredDataset:
    """A version of a data set that is in storage.

    Attributes:
        folder: Its folder.
        version: Name, version and the SHA-256 of the folder's manifest, which changes with every byte.
    """

    folder: Path
    version: DatasetVersion


def store_dataset(storage: Path, *, name: str, version: str, write: Callable[[Path], None]) -> StoredDataset:
    """Return the folder `<storage>/datasets_v2/<name>/<version>/`; write it first if it is missing.

    A version never changes. While one process writes it, others that need it wait. The folder gets a manifest
    with the SHA-256 of each file, and each call compares every file with it. If `write` raises, nothing
    remains.

    `data show` prints two files of the folder, if they exist: `provenance.json`, an object, and
    `statistics.json`, an object with `splits` (`example_statistics` by split) and whatever else was counted.

    Args:
        storage: The storage root, `BuildContext.storage`.
        name: A folder's name.
        version: A folder's name; make it a hash of everything that the files depend on.
        write: Writes the files into an empty folder.

    Raises:
        WmtpError: A file was changed, removed or added since.
    """
    from filelock import FileLock

    folder = dataset_folder(storage, name, version)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not (folder / MANIFEST).is_file():
            with atomic_folder(folder) as unfinished:
                write(unfinished)
    sha256 = verify_manifest(folder)
    return StoredDataset(folder=folder, version=DatasetVersion(name=name, version=version, sha256=sha256))


def sha256_of_file(path: str | Path) -> str:
    """Return the SHA-256 of a file that an option names, in hex.

    Raises:
        WmtpError: It cannot be read.
    """
    try:
        return sha256_of(Path(path))
    except OSError as error:
        raise WmtpError(
            f"cannot read `{path}`: {error.strerror}", hint="paths count from where you start the program"
        ) from error


def difficulty_bin(correct_share: float) -> int:
    """Return the index into `DIFFICULTIES` of a share of correct responses in [0, 1]."""
    return min(int(correct_share * len(DIFFICULTIES)), len(DIFFICULTIES) - 1)


def example_statistics(examples: Iterable[Example]) -> dict[str, Any]:
    """Describe the labelled responses of a split.

    Returns:
        `problems` and `responses`; if there are any, `reward_rate` (mean reward), `prompt_characters` and
        `response_characters` (`least`, `median`, `p95`, `most`), and `difficulty`: the number of problems in
        each of `DIFFICULTIES`.
    """
    rewards: defaultdict[str, list[float]] = defaultdict(list)
    prompts: dict[str, int] = {}
    lengths: list[int] = []
    for example in examples:
        rewards[example.problem_id].append(example.reward)
        prompts[example.problem_id] = len(example.prompt)
        lengths.append(len(example.response))
    counts = {"problems": len(rewards), "responses": len(lengths)}
    if not lengths:
        return counts
    bins = Counter(difficulty_bin(statistics.fmean(row)) for row in rewards.values())
    return counts | {
        "reward_rate": statistics.fmean(reward for row in rewards.values() for reward in row),
        "prompt_characters": _spread(list(prompts.values())),
        "response_characters": _spread(lengths),
        "difficulty": {name: bins[number] for number, name in enumerate(DIFFICULTIES)},
    }


def _spread(lengths: Sequence[int]) -> dict[str, float]:
    ordered = sorted(lengths)
    return {
        "least": ordered[0],
        "median": statistics.median(ordered),
        "p95": ordered[round(0.95 * (len(ordered) - 1))],
        "most": ordered[-1],
    }
