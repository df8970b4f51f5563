"""Public data sets: fetched from the hub, read from JSON lines or parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from weighted_mtp_core.api import Record, WmtpError, json_lines, read_records

RowT = TypeVar("RowT")


def read_public_file(
    path: str | Path, parse: Callable[[Record], RowT], *, check: Callable[[RowT, str], None] | None = None
) -> list[RowT]:
    """Read a file with `read_records`: `.parquet`, or JSON lines, gzipped (`.gz`) or not.

    Raises:
        WmtpError: The file cannot be read or has invalid records.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        return read_records(path, parse, read=_parquet, check=check)
    return read_records(path, parse, what="line", read=json_lines, check=check)


def _parquet(path: Path) -> Iterator[tuple[int, object]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=64)
        yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
    except ArrowInvalid as error:
        raise WmtpError(f"cannot read `{path}`: {error}") from error


def from_hub(repository: str, configuration: str, *, split: str, folder: Path) -> Path:
    """Return a local copy of a split of a data set; fetch it from the Hugging Face hub if it is missing.

    Args:
        repository: Id of the data set on the hub.
        configuration: Name of the table of the data set.
        split: Name of the split, or several joined by `+`.
        folder: The folder of the copies, which are `.jsonl` files.

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
            hint=f"pip install 'weighted-mtp-code-tasks[hub]', {instead}",
        ) from error
    try:
        rows = datasets.load_dataset(repository, configuration, split=split)
    except OSError as error:
        raise WmtpError(
            f"cannot fetch `{repository}` from the hub: {error}", hint=f"connect this machine, {instead}"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    unfinished.replace(file)
    return file
