"""Find the files that an option of a data source selects by path, pattern, folder or address on the hub."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weighted_mtp_core.errors import WmtpError

_HUB = re.compile(
    r"hub:(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<configuration>[\w.-]+))?:(?P<split>[\w.+-]+)"
)


def data_files(text: str, *, downloads: Path) -> list[Path]:
    """Return the files that an option selects, in the order in which they are read.

    The option has one of these forms:

    - the path of a file;
    - a pattern such as `data/train-*.parquet`; the matching files are read in the order of their names;
    - a folder that the method `Dataset.save_to_disk` of the package `datasets` wrote;
    - a split of a data set on the Hugging Face hub: `hub:OWNER/NAME:SPLIT`, or
      `hub:OWNER/NAME@REVISION:CONFIGURATION:SPLIT`, where revision and configuration are optional.

    Args:
        text: The value of the option.
        downloads: The folder for copies of data sets from the hub.

    Raises:
        WmtpError: No file matches, the folder is not one saved data set or is damaged, or the address on the
            hub is malformed or cannot be fetched.
    """
    if text.startswith("hub:"):
        if not (address := _HUB.fullmatch(text)):
            raise WmtpError(
                f"`{text}` is not an address of the hub",
                hint="hub:OWNER/NAME:SPLIT, or hub:OWNER/NAME@REVISION:CONFIGURATION:SPLIT",
            )
        return [from_hub(**address.groupdict(), folder=downloads)]
    path = Path(text)
    if path.is_dir():
        return _saved(path)
    if path.exists():
        return [path]
    if glob.has_magic(text):
        if found := sorted(map(Path, glob.glob(text))):  # noqa: PTH207 - the pattern may be absolute
            return found
        raise WmtpError(f"no file matches `{text}`", hint="paths count from where you start the run")
    raise WmtpError(f"there is no file `{text}`", hint="paths count from where you start the run")


def _saved(folder: Path) -> list[Path]:
    """Return the files of a folder that `Dataset.save_to_disk` wrote."""
    state, splits = folder / "state.json", folder / "dataset_dict.json"
    if state.is_file():
        with _written_by_datasets(state) as saved:
            return [folder / each["filename"] for each in saved["_data_files"]]
    if splits.is_file():
        with _written_by_datasets(splits) as saved:
            hint = ", ".join(f"`{folder / name}`" for name in saved["splits"])
        raise WmtpError(f"`{folder}` holds several splits", hint=f"name one of {hint}")
    raise WmtpError(
        f"`{folder}` is a folder, and not one that `Dataset.save_to_disk` wrote",
        hint=f"name its files, for example `{folder / '*.parquet'}`",
    )


@contextmanager
def _written_by_datasets(file: Path) -> Iterator[Any]:
    """Yield the content of a JSON file of a saved data set; an error while it is used is a damaged file."""
    try:
        yield json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise WmtpError(
            f"`{file}` is damaged: it does not list what belongs to a data set",
            hint="save the data set again with `Dataset.save_to_disk`",
        ) from error


def from_hub(
    repository: str, configuration: str | None, *, split: str, folder: Path, revision: str | None = None
) -> Path:
    """Return a local copy of a split of a data set; a missing copy is fetched from the Hugging Face hub.

    If a copy exists, it is used unchanged, and neither the network nor the package `datasets` is needed.

    Args:
        repository: Id of the data set on the hub.
        configuration: Name of a configuration of the data set; None for the only or the default one.
        split: Name of the split, or several names joined by `+`.
        folder: The folder for the copies, which are `.parquet` files.
        revision: Branch, tag or commit of the data set; by default the main branch.

    Raises:
        WmtpError: No copy exists, and the package `datasets` is not installed or the hub does not provide
            the data.
    """
    parts = (repository, revision, configuration, split)
    name = "--".join(re.sub(r"[^A-Za-z0-9._-]", "-", part.replace("/", "--")) for part in parts if part)
    file = folder / f"{name}.parquet"
    if file.is_file():
        return file
    instead = "or name local files in `[data.options]`"
    try:
        import datasets
    except ImportError as error:
        raise WmtpError(
            f"`{repository}` must be fetched from the hub, which needs the package `datasets`",
            hint=f"pip install 'weighted-mtp-core[hub]', {instead}",
        ) from error
    try:
        rows = datasets.load_dataset(repository, configuration, split=split, revision=revision)
    except Exception as error:  # the hub's client raises errors of several libraries
        raise WmtpError(
            f"cannot fetch `{repository}` from the hub: {error}",
            hint=f"connect this machine, check the names of the data set and of the split, {instead}",
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    rows.to_parquet(unfinished)
    unfinished.replace(file)
    return file
