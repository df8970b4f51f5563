"""Store generated data sets: each is written once under the storage root and verified at each use."""

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
"""Bins of a problem's mean reward, from hard to easy problems; the last bin includes 100 %.

If rewards are 0 or 1, the mean reward of a problem is its share of correct responses.
"""


@frozen(kw_only=True)
class StoredDataset:
    """One stored version of a data set.

    Attributes:
        folder: The folder that contains the files.
        version: Name and version of the data set, and the SHA-256 of the folder's manifest. The SHA-256 of
            the manifest changes if any byte of the files changes.
    """

    folder: Path
    version: DatasetVersion


def store_dataset(storage: Path, *, name: str, version: str, write: Callable[[Path], None]) -> StoredDataset:
    """Return the data set in `<storage>/datasets_v2/<name>/<version>/`; if it is missing, write it first.

    A version never changes. While one process writes a version, other processes that need this version wait.
    The folder gets a manifest with the SHA-256 of each file, and each call verifies every file against the
    manifest. If `write` raises an exception, its files are removed.

    The command `data show` prints two JSON files of the folder if they exist: `provenance.json`, and
    `statistics.json`. The file `statistics.json` has the key `splits`, with the result of
    `example_statistics` for each split, and may contain other counts.

    Args:
        storage: The storage root, `BuildContext.storage`.
        name: Name of the data set; it must be a valid folder name.
        version: Name of the version; it must be a valid folder name, and should be a hash of everything that
            the files depend on.
        write: Called with an empty folder; must write the files into this folder.

    Raises:
        WmtpError: A file of the folder was changed, removed or added after the folder was written.
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
    """Return the SHA-256, in hexadecimal digits, of a file that an option of a recipe selects.

    Raises:
        WmtpError: The file cannot be read.
    """
    try:
        return sha256_of(Path(path))
    except OSError as error:
        raise WmtpError(
            f"cannot read `{path}`: {error.strerror}", hint="paths count from where you start the program"
        ) from error


def difficulty_bin(correct_share: float) -> int:
    """Return the index of the bin in `DIFFICULTIES` that contains `correct_share`, in [0, 1]."""
    return min(int(correct_share * len(DIFFICULTIES)), len(DIFFICULTIES) - 1)


def example_statistics(examples: Iterable[Example]) -> dict[str, Any]:
    """Describe the labelled responses of a split.

    Returns:
        The counts `problems` and `responses`. If the split is not empty, the result also contains
        `reward_rate` (mean reward), `prompt_characters` and `response_characters` (`least`, `median`, `p95`
        and `most` of the lengths), and `difficulty` (number of problems in each bin of `DIFFICULTIES`).
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
