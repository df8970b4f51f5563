"""Fetch public data sets from the hub, and tell files apart by content."""

from __future__ import annotations

import json
from pathlib import Path

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.storage.manifest import sha256_of


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file that a user named.

    Raises:
        WmtpError: It is not there.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise WmtpError(
            f"cannot read `{path}`: {error.strerror}", hint="paths count from where you start the program"
        ) from error


def from_hub(repository: str, configuration: str, *, split: str, folder: Path) -> Path:
    """Return the copy in `folder` of a split of a data set; fetch it from the Hugging Face hub if need be.

    Args:
        repository: Its id.
        configuration: Which of its tables.
        split: Name of the split, or several joined by `+`.
        folder: Of the copies, as `.jsonl`.

    Raises:
        WmtpError: The package `datasets` is not installed, or the hub cannot be reached.
    """
    file = folder / f"{repository.replace('/', '--')}--{configuration}--{split}.jsonl"
    if file.is_file():
        return file
    instead = "or name a local copy in `[data.options]`"
    try:
        import datasets
    except ImportError as error:
        raise WmtpError(
            f"`{repository}` must be fetched from the hub, which needs the package `datasets`",
            hint=f"pip install 'weighted-mtp-core[hub]', {instead}",
        ) from error
    try:
        rows = datasets.load_dataset(repository, configuration, split=split)
    except OSError as error:
        raise WmtpError(
            f"cannot fetch `{repository}` from the hub: {error}", hint=f"connect this machine, {instead}"
        ) from error
    atomic_write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file
