"""Write files atomically; `manifest.atomic_folder` writes whole folders atomically."""

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
    """Write a file atomically, so that readers get either the complete old or the complete new contents."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield an empty file that replaces `path` after the `with` block, unless the block raises an exception.

    Readers of `path` therefore get either the complete old or the complete new contents, even after a crash.
    If the process is killed, the next call for `path` deletes the unfinished file `.<name>.<random>`.
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
    """Yield a new folder `.<name>.<random>` next to `path`, which the `with` block fills and renames.

    If the block does not rename the folder, the folder is deleted: at the end of the block, or, if the
    process is killed, by the next call for `path`. A lock on the folder shows that the process is alive.
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
    """Return a new path `.<name>.<random>` next to `path`; `delete_abandoned` recognises such names."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _new_locked(path: Path, create: Callable[[Path], None]) -> tuple[Path, int]:
    """Create a file or folder next to `path` and lock it; return its path and the descriptor of the lock.

    On a file system without locks, the file or folder is created without a lock.
    """
    while True:
        temporary = unfinished_name(path)
        create(temporary)
        with suppress(FileNotFoundError):  # another process deleted it before it was locked
            lock = os.open(temporary, os.O_RDONLY)
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, lock
            os.close(lock)


def delete_abandoned(path: Path) -> None:
    """Delete the unfinished files and folders for `path` that killed processes left behind.

    On a file system without locks, they are kept, because they may be in use.
    """
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}"):
        with suppress(FileNotFoundError):
            lock = os.open(temporary, os.O_RDONLY)
            with suppress(OSError):  # it is in use, or the file system has no locks
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
