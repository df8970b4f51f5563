"""Writes a file atomically; `manifest.atomic_folder` writes a whole folder atomically."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file with `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield an empty file that replaces `path` after the block, unless the block fails.

    So readers always get the complete old or new contents, even after a crash. If the process is killed, the
    next call for `path` deletes the unfinished file `.<name>.<random>`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    delete_abandoned(path)
    temporary, lock = _new_locked(path, Path.touch)
    try:
        yield temporary
        sync_to_disk(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)
    sync_to_disk(path.parent)


@contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder `.<name>.<random>` beside `path`, which the block fills and renames.

    A folder that was not renamed is deleted: in the end, or, if the process is killed, by the next call for
    `path`. A lock on the folder shows that its process is alive.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    delete_abandoned(path)
    folder, lock = _new_locked(path, Path.mkdir)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def unfinished_name(path: Path) -> Path:
    """Return a new name `.<name>.<random>` in the folder of `path`; `delete_abandoned` recognises it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _new_locked(path: Path, create: Callable[[Path], None]) -> tuple[Path, int]:
    """Create a file or folder next to `path`; return it with a descriptor that locks it, if locks exist."""
    while True:
        temporary = unfinished_name(path)
        create(temporary)
        with suppress(FileNotFoundError):  # another process took it for abandoned before it was locked
            lock = os.open(temporary, os.O_RDONLY)
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, lock
            os.close(lock)


def delete_abandoned(path: Path) -> None:
    """Delete the unfinished files and folders for `path` that killed processes left."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}"):
        with suppress(FileNotFoundError):
            lock = os.open(temporary, os.O_RDONLY)
            with suppress(OSError):  # in use, or on a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if temporary.is_dir():
                    shutil.rmtree(temporary)
                else:
                    temporary.unlink()
            os.close(lock)


def sync_to_disk(path: Path) -> None:
    """Wait until the contents of a file, or the file names in a folder, are written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
