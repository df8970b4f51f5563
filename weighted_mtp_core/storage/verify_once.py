"""Verify large folders once: hash them again only if a file was touched since.

Hashing costs seconds a gigabyte, so a run that starts on a known corpus would wait for its size. A file that
is written to gets another time of change from the operating system, and no program can set that back.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.storage.manifest import MANIFEST, files_of, verify_manifest


def verify_once(folder: Path) -> str:
    """Return the folder's own SHA-256; compare its files with the manifest unless none changed since.

    What was found lies beside the folder, in `<folder>.verified`; `verify_manifest` hashes in any case.

    Raises:
        WmtpError: See `verify_manifest`.
    """
    record = folder.with_name(f"{folder.name}.verified")
    touched = _touched(folder)
    if record.is_file() and record.read_text(encoding="utf-8") == touched:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    sha256 = verify_manifest(folder)
    atomic_write(record, touched)
    return sha256


def _touched(folder: Path) -> str:
    """Return size, inode and times of change of every file, as text."""
    files = [*files_of(folder), *folder.glob(MANIFEST)]
    states = {file.relative_to(folder).as_posix(): file.stat() for file in files}
    return json.dumps(
        {name: [s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for name, s in states.items()},
        indent=1,
        sort_keys=True,
    )
