"""Writes a file atomically; `manifest.atomic_folder` writes a whole folder atomically."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file so that readers always get the complete old or new contents, even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_to_disk(path.parent)


@contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder `.<name>.<random>` beside `path`, which the block fills and renames.

    A folder that was not renamed is deleted: in the end, or, if the process is killed, by the next call for
    `path`. A lock on the folder shows that its process is alive.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    delete_abandoned(path)
    folder, lock = _new_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _new_folder(path: Path) -> tuple[Path, int]:
    """Create a folder beside `path`, and a descriptor that locks it unless the file system has no locks."""
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        folder.mkdir()
        with suppress(FileNotFoundError):  # another process took it for abandoned before it was locked
            lock = os.open(folder, os.O_RDONLY)
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def delete_abandoned(path: Path) -> None:
    """Delete the unfinished folders for `path` that killed processes left."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*/"):
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # in use, or on a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            os.close(lock)


def sync_to_disk(path: Path) -> None:
    """Wait until the contents of a file, or the file names in a folder, are written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
