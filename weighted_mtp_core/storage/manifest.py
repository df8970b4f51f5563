"""A manifest lists the files of a folder with their SHA-256, so that a changed byte is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.storage.atomic import atomic_write, sync_to_disk

MANIFEST = "manifest.json"
DERIVED = "derived"
"""Subfolder for files derived from a folder, not in its manifest; each folder in it has its own manifest."""

_LINKED: dict[tuple[int, ...], str] = {}
"""Checksums of files with several hard links, by device, inode, size and time of change."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_chunks(chunks: Iterable[bytes]) -> str:
    """Return the SHA-256 of a stream, in hex."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`, with a manifest, if the block ends without an error.

    A folder that exists already, or that another process creates in the meantime, is kept; with `replace` it
    is renamed, replaced and deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in files_of(temporary):
            file.chmod(file.stat().st_mode | 0o444)  # safetensors creates files that only the owner can read
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, old: Path) -> None:
    """Replace a folder by another one, or keep it if that fails."""
    aside = Path(tempfile.mkdtemp(dir=old.parent, prefix=f".{old.name}."))
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    shutil.rmtree(aside)


def write_manifest(folder: Path) -> str:
    """List the files of a folder with size and SHA-256 in `manifest.json`; return the folder's SHA-256.

    The folder's checksum is that of the manifest, so it changes with any byte of any file.
    """
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256_of_link(file)}
        for file in files_of(folder)
    }
    text = json.dumps({"format": 1, "files": files}, indent=1, sort_keys=True) + "\n"
    atomic_write(folder / MANIFEST, text)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256_of_link(file: Path) -> str:
    """Return the SHA-256 of a file; another hard link to the same file is not read again."""
    found = file.stat()
    if found.st_nlink == 1:
        return sha256_of(file)
    identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    if identity not in _LINKED:
        _LINKED[identity] = sha256_of(file)
    return _LINKED[identity]


def verify_manifest(folder: Path) -> str:
    """Compare a folder with its manifest; return the folder's SHA-256.

    Raises:
        WmtpError: A file has changed, is missing or was added, or there is no manifest.
    """
    manifest = folder / MANIFEST
    fix = f"delete `{folder}` so that it is created again, or restore the file"
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
    """Return the files that a manifest lists, sorted: all except itself and derived files."""
    return [
        file
        for file in files_below(folder)
        if file != folder / MANIFEST and file.relative_to(folder).parts[0] != DERIVED
    ]


def files_below(folder: Path) -> list[Path]:
    """Return every file in a folder and in its subfolders, linked ones included, sorted."""
    return sorted(Path(path, name) for path, _, names in os.walk(folder, followlinks=True) for name in names)
