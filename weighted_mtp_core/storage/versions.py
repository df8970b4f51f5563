"""Versions of models and data sets: `models_v2/<name>/<version>/`, `datasets_v2/<name>/<version>/`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from attrs import frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.identifiers import check_path
from weighted_mtp_core.storage.manifest import MANIFEST, atomic_folder, verify_manifest

Kind = Literal["models_v2", "datasets_v2"]
KINDS: tuple[Kind, ...] = ("models_v2", "datasets_v2")


@frozen(kw_only=True)
class Version:
    """One version of a model or a data set.

    Attributes:
        path: The folder.
        address: `<kind>/<name>/<version>`.
    """

    path: Path
    address: str


def dataset_folder(storage: Path, name: str, version: str) -> Path:
    """Return the folder of a version of a data set, which may not exist."""
    return storage / "datasets_v2" / name / version


def versions(storage: Path) -> Iterator[Version]:
    """Yield every version below a storage root, sorted; a folder without a manifest is not one."""
    for kind in KINDS:
        for manifest in sorted((storage / kind).glob(f"*/*/{MANIFEST}")):
            path = manifest.parent
            yield Version(path=path, address=path.relative_to(storage).as_posix())


def add_version(storage: Path, source: Path, *, kind: Kind, name: str, version: str) -> Version:
    """Copy a file or a folder into storage as a new version, with a manifest.

    Raises:
        WmtpError: A name cannot be a folder, there is nothing to copy, or the version exists already.
    """
    try:
        check_path(name)
        check_path(version)
    except ValueError as error:
        raise WmtpError(str(error)) from error
    if not source.exists():
        raise WmtpError(f"there is no `{source}` to add")
    path = storage / kind / name / version
    if path.exists():
        raise WmtpError(
            f"`{path}` exists already, and a version never changes", hint="add it under another version"
        )
    with atomic_folder(path) as folder:
        if source.is_dir():
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        else:
            shutil.copy2(source, folder / source.name)
    verify_manifest(path)
    return Version(path=path, address=path.relative_to(storage).as_posix())
