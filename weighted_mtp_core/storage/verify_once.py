"""Verify a large folder once, and again only after a file has changed.

Hashing takes seconds per gigabyte, which would delay each run on a large corpus. Changes are detected by the
change time (ctime) of files, which the operating system updates at each write and programs cannot reset.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.storage.manifest import MANIFEST, files_of, verify_manifest


def verify_once(folder: Path) -> str:
    """Return the SHA-256 of a folder; if it is not known to be unchanged, first verify it by its manifest.

    The folder is known to be unchanged if no file has changed since the last verification. The file
    `<folder>.verified` next to the folder records the state of all files at that time. Unlike
    `verify_once`, `verify_manifest` always hashes all files.

    Raises:
        WmtpError: A file was changed, removed or added, or the folder has no manifest that can be read.
    """
    record = folder.with_name(f"{folder.name}.verified")
    states = _file_states(folder)
    if record.is_file() and record.read_text(encoding="utf-8") == states:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    sha256 = verify_manifest(folder)
    atomic_write(record, states)
    return sha256


def _file_states(folder: Path) -> str:
    """Return size, inode, modification time and change time of every file, as text."""
    files = [*files_of(folder), *folder.glob(MANIFEST)]
    states = {file.relative_to(folder).as_posix(): file.stat() for file in files}
    return json.dumps(
        {name: [s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for name, s in states.items()},
        indent=1,
        sort_keys=True,
    )
