"""The scratch folder, to which programs may write: its limits, and how it is emptied."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

MAX_BYTES = 16 * 1024 * 1024
MAX_FILES = 2048


def is_too_full(folder: str) -> bool:
    """Return whether the scratch folder exceeds its limits, or contains a folder that cannot be read.

    A program may change the folder at the same time.
    """
    size = count = 0
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    count += 1
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:  # removed since it was listed
            continue
        except OSError:  # its path is too long, or it is not readable
            return True
        if size > MAX_BYTES or count > MAX_FILES:
            return True
    return False


def is_mount_too_full(folder: str) -> bool:
    """Return whether the file system that is mounted on the scratch folder exceeds the limits.

    If the file system cannot be examined, return False.
    """
    try:
        found = os.statvfs(folder)
    except OSError:  # the process that mounted it has ended
        return False
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    return used > MAX_BYTES or found.f_files - found.f_ffree > MAX_FILES


def empty(folder: str) -> None:
    """Remove all content of a folder that no process uses any more.

    Nested folders are moved to the top before they are removed. Recursion, as in `shutil.rmtree`, would fail
    if a program nests folders deeper than Python's recursion limit.

    Raises:
        OSError: A file or folder cannot be removed.
    """
    top = Path(folder)
    names = itertools.count()
    while entries := list(top.iterdir()):
        for entry in entries:
            if entry.is_symlink() or not entry.is_dir():
                entry.unlink()
                continue
            entry.chmod(0o700)
            for inner in list(entry.iterdir()):
                if inner.is_symlink() or not inner.is_dir():
                    inner.unlink()
                else:
                    inner.chmod(0o700)  # a folder can only be moved if it is writable
                    inner.rename(_unused(top, names))
            entry.rmdir()


def _unused(top: Path, names: itertools.count[int]) -> Path:
    while os.path.lexists(path := top / f"up-{next(names)}"):
        pass
    return path
