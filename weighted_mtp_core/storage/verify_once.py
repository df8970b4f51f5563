"""Verify a large folder once, and again only after a file has changed.

Hashing takes seconds per gigabyte, which would delay each run on a large corpus. The operating system updates
the change time (ctime) of a file that is written to, and no program can set it back.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.storage.manifest import MANIFEST, files_of, verify_manifest


def verify_once(folder: Path) -> str:
    """Return the SHA-256 of a folder, after comparing its files with the manifest if one of them has changed.

    The result is kept beside the folder, in `<folder>.verified`; `verify_manifest` always hashes.

    Raises:
        WmtpError: See `verify_manifest`.
    """
    record = folder.with_name(f"{folder.name}.verified")
    states = _file_states(folder)
    if record.is_file() and record.read_text(encoding="utf-8") == states:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    sha256 = verify_manifest(folder)
    atomic_write(record, states)
    return sha256


def _file_states(folder: Path) -> str:
    """Return size, inode, modification and change time of every file, as text."""
    files = [*files_of(folder), *folder.glob(MANIFEST)]
    states = {file.relative_to(folder).as_posix(): file.stat() for file in files}
    return json.dumps(
        {name: [s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for name, s in states.items()},
        indent=1,
        sort_keys=True,
    )
