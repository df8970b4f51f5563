"""Versions of models (`models_v2/<name>/<version>/`) and of data sets (`datasets_v2/<name>/<version>/`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from attrs import frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.identifiers import check_path
from weighted_mtp_core.storage.manifest import (
    DERIVED,
    MANIFEST,
    atomic_folder,
    files_below,
    verify_manifest,
)

Kind = Literal["models_v2", "datasets_v2"]
KINDS: tuple[Kind, ...] = ("models_v2", "datasets_v2")


@frozen(kw_only=True)
class Version:
    """One version of a model or a data set.

    Attributes:
        path: The folder of the version.
        address: The path `<kind>/<name>/<version>` below the storage root.
    """

    path: Path
    address: str


def dataset_folder(storage: Path, name: str, version: str) -> Path:
    """Return the folder of a version of a data set, whether or not the folder exists."""
    return storage / "datasets_v2" / name / version


def versions(storage: Path) -> Iterator[Version]:
    """Yield all versions of models and data sets below a storage root, sorted.

    Folders without a manifest are skipped.
    """
    for kind in KINDS:
        for manifest in sorted((storage / kind).glob(f"*/*/{MANIFEST}")):
            path = manifest.parent
            yield Version(path=path, address=path.relative_to(storage).as_posix())


def add_version(storage: Path, source: Path, *, kind: Kind, name: str, version: str) -> Version:
    """Copy a file or a folder into storage as a new version, with a manifest.

    Raises:
        WmtpError: `name` or `version` is not a valid name of a folder, `source` does not exist or cannot be
            copied, the version already exists, or a file of `source` has a reserved or invalid name.
    """
    try:
        check_path(name)
        check_path(version)
    except ValueError as error:
        raise WmtpError(str(error)) from error
    if "/" in name or "/" in version:
        raise WmtpError(
            f"`{name}/{version}` is not a name and a version: both are the name of one folder",
            hint="use no `/` in the name or in the version",
        )
    if not source.exists():
        raise WmtpError(f"`{source}` does not exist")
    _refuse_reserved_names(source)
    path = storage / kind / name / version
    if path.exists():
        raise WmtpError(
            f"`{path}` already exists, and a version never changes", hint="choose another version"
        )
    with atomic_folder(path) as folder:
        try:
            if source.is_dir():
                shutil.copytree(source, folder, dirs_exist_ok=True)
            else:
                shutil.copy2(source, folder / source.name)
        except (shutil.Error, OSError) as error:
            first = (
                error.args[0][0] if isinstance(error, shutil.Error) else (error.filename, "", error.strerror)
            )
            raise WmtpError(f"cannot copy `{first[0]}`: {first[2]}", hint="nothing was added") from error
    verify_manifest(path)
    return Version(path=path, address=path.relative_to(storage).as_posix())


def _refuse_reserved_names(source: Path) -> None:
    """Refuse files with a name that is reserved or not UTF-8; a valid manifest is allowed and rewritten."""
    found = {each.name: each for each in (source.iterdir() if source.is_dir() else [source])}
    if source.is_dir() and MANIFEST in found:
        with suppress(WmtpError):
            verify_manifest(source)
            del found[MANIFEST]
    for name in (MANIFEST, DERIVED):
        if name in found:
            raise WmtpError(
                f"`{found[name]}` cannot be kept: core uses this name in every version",
                hint="rename it, or leave it out",
            )
    for file in files_below(source) if source.is_dir() else [source]:
        try:
            str(file).encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(file).decode(errors="backslashreplace")
            raise WmtpError(f"`{shown}` cannot be kept: its name is not UTF-8", hint="rename it") from error


def derived(version: Version) -> list[Path]:
    """Return the finished folders with files derived from a version, such as token caches."""
    found = version.path.glob(f"{DERIVED}/*")
    return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))


def unlisted(storage: Path) -> dict[str, int]:
    """Return the number of files that belong to no version, keyed by the start of their path.

    A key has up to three parts, `<kind>/<name>/<version>`. All files in the folder of a version count as its
    files, except files directly in its folder `derived`. The files `<folder>.lock` and `<folder>.verified`
    next to a folder are not counted. `verify_manifest` finds files that the manifest of a version does not
    list.
    """
    known = {version.path for version in versions(storage)}
    counts: dict[str, int] = {}
    for file in (each for kind in KINDS for each in files_below(storage / kind)):
        is_derived = file.parent.name == DERIVED and file.parent.parent in known
        is_ours = file.suffix in {".lock", ".verified"} and file.with_suffix("").is_dir()
        if not is_ours and (is_derived or known.isdisjoint(file.parents)):
            address = "/".join(file.relative_to(storage).parts[:3])
            counts[address] = counts.get(address, 0) + 1
    return counts
