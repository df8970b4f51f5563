"""Upload models and data sets to S3; files that S3 does not have are uploaded in parallel and verified.

Manifests are uploaded last, so a version with a manifest on S3 is complete. To continue an interrupted
upload, repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attrs import frozen

from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.redaction import redact
from weighted_mtp_core.storage import s3
from weighted_mtp_core.storage.manifest import MANIFEST, files_of, sha256_of, verify_manifest
from weighted_mtp_core.storage.versions import versions

_WORKERS = 4
_DIGEST = "sha256"  # key of the metadata that each uploaded object gets


@frozen(kw_only=True)
class Item:
    """One file, its key in the bucket and its size; `is_manifest` is True for the manifest of a version."""

    path: Path
    key: str
    size: int
    is_manifest: bool


@frozen(kw_only=True)
class UploadPlan:
    """The files that an upload will send, and the place to which it will send them.

    Attributes:
        location: The bucket and the prefix to which the files are uploaded.
        new: The files that S3 does not have.
        stored: Number of files that S3 already has.
    """

    location: s3.S3Location
    new: tuple[Item, ...]
    stored: int

    @property
    def size(self) -> int:
        """Total size of the files to upload, in bytes."""
        return sum(item.size for item in self.new)


def plan_upload(storage: Path, to: str) -> UploadPlan:
    """Verify all versions on this machine, then find the files that S3 does not have.

    Raises:
        WmtpError: `to` is not an S3 location, there is no model or data set, a file was changed after its
            manifest was written, or the bucket cannot be used.
    """
    location = s3.S3Location.parse(to)
    found = list(versions(storage))
    if not found:
        raise WmtpError(
            f"there is no model or data set in `{storage}`",
            hint="add one: python -m weighted_mtp_core storage add-model NAME VERSION FOLDER",
        )
    client = s3.open_bucket(location.bucket)
    items = [item for version in found for item in _items(version.path, storage, location)]
    with ThreadPoolExecutor(_WORKERS) as pool:
        stored = list(pool.map(lambda item: _is_there(client, location.bucket, item), items))
    new = tuple(item for item, there in zip(items, stored, strict=True) if not there)
    return UploadPlan(location=location, new=new, stored=sum(stored))


def upload(plan: UploadPlan, *, on_done: Callable[[Item], None]) -> None:
    """Upload the new files of a plan and verify each file; manifests are uploaded last.

    Args:
        plan: A plan from `plan_upload`.
        on_done: Called after each uploaded file, possibly from several threads at once.

    Raises:
        RunFailedError: A file could not be uploaded, or the object on S3 differs from the file; files that
            were uploaded before remain on S3.
        WmtpError: The endpoint is not a valid URL, or the store refuses a request for an uploaded object.
    """
    client = s3.connect()
    manifests = [item for item in plan.new if item.is_manifest]
    files = [item for item in plan.new if not item.is_manifest]

    def upload_one(item: Item) -> None:
        _upload(client, plan.location.bucket, item)
        on_done(item)

    with ThreadPoolExecutor(_WORKERS) as pool:
        for group in (files, manifests):
            list(pool.map(upload_one, group))  # an error cancels uploads that have not begun


def _upload(client: Any, bucket: str, item: Item) -> None:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client.upload_file(
            str(item.path), bucket, item.key, ExtraArgs={"Metadata": {_DIGEST: sha256_of(item.path)}}
        )
        whole = s3.is_stored(client, bucket, item.key, item.path)
    except (Boto3Error, BotoCoreError, ClientError) as error:
        again = "run the same command again: it continues with the missing files"
        if refused := s3.advice(error):
            text, hint = f"the bucket `{bucket}` {refused[0]}", f"{refused[1]}; then {again}"
        else:
            text, hint = redact(str(error)), again
        raise RunFailedError(f"`{item.path}` could not be uploaded: {text}", hint=hint) from error
    if not whole:
        raise RunFailedError(f"`s3://{bucket}/{item.key}` differs from `{item.path}`")


def _items(version: Path, storage: Path, location: s3.S3Location) -> Iterator[Item]:
    verify_manifest(version)
    for path in [*files_of(version), version / MANIFEST]:
        key = location.prefix + path.relative_to(storage).as_posix()
        yield Item(path=path, key=key, size=path.stat().st_size, is_manifest=path == version / MANIFEST)


def _is_there(client: Any, bucket: str, item: Item) -> bool:
    found = s3.head(client, bucket, item.key)
    if found is None:
        return False
    digest = found.get("Metadata", {}).get(_DIGEST)
    if digest is None:  # the object was uploaded by another program
        return s3.is_stored(client, bucket, item.key, item.path)
    return bool(found["ContentLength"] == item.size and digest == sha256_of(item.path))
