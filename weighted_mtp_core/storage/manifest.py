"""Write and verify manifests, which list the files of a folder with their SHA-256 to detect changed bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.storage.atomic import atomic_write, sync_to_disk, unfinished_folder, unfinished_name

MANIFEST = "manifest.json"
DERIVED = "derived"
"""Name of the subfolder for derived files, such as caches, which the manifest of the folder does not list.

Each folder in the subfolder `derived` has a manifest of its own.
"""

_LINKED: dict[tuple[int, ...], str] = {}
"""SHA-256 of files with several hard links, keyed by device, inode, size and time of modification."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_chunks(chunks: Iterable[bytes]) -> str:
    """Return the SHA-256 of a stream of bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`, with a manifest, if the `with` block raises no exception.

    If `path` already exists with a manifest, or another process creates it during the block, the existing
    folder is kept and the temporary folder is deleted. With `replace`, an existing folder `path` is replaced
    with the temporary folder and deleted.

    Raises:
        OSError: A file cannot be written, or `path` is a file or, without `replace`, a folder that contains
            files but no manifest.
    """
    with unfinished_folder(path) as temporary:
        yield temporary
        for file in files_of(temporary):
            file.chmod(
                file.stat().st_mode | 0o444
            )  # because only the owner can read a file that safetensors has written
            sync_to_disk(file)
        write_manifest(temporary)
        temporary.chmod(0o755)
        if replace and path.exists():
            _swap(temporary, path)
        else:
            try:
                temporary.rename(path)
            except OSError:
                if not (path / MANIFEST).is_file():
                    raise
        sync_to_disk(path.parent)


def _swap(new: Path, old: Path) -> None:
    """Replace the folder `old` with the folder `new`; if this fails, `old` is kept."""
    aside = old.rename(unfinished_name(old))
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    shutil.rmtree(aside)


def write_manifest(folder: Path) -> str:
    """List the files of a folder with size and SHA-256 in `manifest.json`; return the folder's SHA-256.

    The SHA-256 of a folder is the SHA-256 of its manifest, so it changes if any byte of the files changes.
    """
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256_of_link(file)}
        for file in files_of(folder)
    }
    text = json.dumps({"format": 1, "files": files}, indent=1, sort_keys=True) + "\n"
    atomic_write(folder / MANIFEST, text)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256_of_link(file: Path) -> str:
    """Return the SHA-256 of a file; a file with several hard links is read only once."""
    found = file.stat()
    if found.st_nlink == 1:
        return sha256_of(file)
    identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    if identity not in _LINKED:
        _LINKED[identity] = sha256_of(file)
    return _LINKED[identity]


def verify_manifest(folder: Path) -> str:
    """Verify the files of a folder against its manifest; return the SHA-256 of the folder.

    Raises:
        WmtpError: A file was changed, removed or added, or the folder has no manifest that can be read.
    """
    manifest = folder / MANIFEST
    fix = f"restore the file, or delete `{folder}` if it can be created again"
    try:
        text = manifest.read_text(encoding="utf-8")
        listed = json.loads(text)["files"]
    except FileNotFoundError as error:
        raise WmtpError(f"`{folder}` has no `{MANIFEST}`", hint=fix) from error
    except (ValueError, KeyError, TypeError) as error:
        raise WmtpError(f"`{manifest}` cannot be read: {error}", hint=fix) from error
    found = {file.relative_to(folder).as_posix(): file for file in files_of(folder)}
    for name in sorted(listed.keys() | found.keys()):
        if name not in found or not found[name].is_file():
            raise WmtpError(f"`{folder / name}` is missing", hint=fix)
        if name not in listed:
            raise WmtpError(f"`{folder / name}` is not in the manifest", hint=fix)
        if sha256_of(found[name]) != listed[name]["sha256"]:
            raise WmtpError(f"`{folder / name}` changed since it was written: its SHA-256 differs", hint=fix)
    return hashlib.sha256(text.encode()).hexdigest()


def files_of(folder: Path) -> list[Path]:
    """Return all files of a folder except its manifest and its derived files, sorted."""
    return [
        file
        for file in files_below(folder)
        if file != folder / MANIFEST and file.relative_to(folder).parts[0] != DERIVED
    ]


def files_below(folder: Path) -> list[Path]:
    """Return all files in a folder and its subfolders, sorted; symbolic links are followed."""
    return sorted(Path(path, name) for path, _, names in os.walk(folder, followlinks=True) for name in names)
