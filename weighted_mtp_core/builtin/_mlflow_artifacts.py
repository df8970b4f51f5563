"""Store files in a run's artifact store, and make sure that they arrived."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient

from weighted_mtp_core.storage import s3
from weighted_mtp_core.storage.manifest import sha256_of

CHECKPOINT = "best_model.pt"
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_SLOWEST_BYTES_A_SECOND = 1_000_000


class NotStoredError(Exception):
    """The artifact store has not what was sent."""


def check_store(client: MlflowClient, run_id: str) -> None:
    """Find out before training whether files can be stored.

    Raises:
        WmtpError: The bucket is missing or refuses the credentials.
    """
    uri = client.get_run(run_id).info.artifact_uri
    if uri.startswith("s3://"):
        s3.open_bucket(s3.S3Place.parse(uri).bucket)
    else:
        client.list_artifacts(run_id)  # asks a server that stores for us whether it can


def store(client: MlflowClient, run_id: str, path: Path, subdir: str) -> None:
    """Upload a file and confirm it: by ETag where S3 is reached directly, by size elsewhere.

    Raises:
        NotStoredError: What is stored is not what was sent; to be sent again.
    """
    with _patience(path.stat().st_size):
        client.log_artifact(run_id, str(path), subdir or None)
    uri = client.get_run(run_id).info.artifact_uri
    name = f"{subdir}/{path.name}" if subdir else path.name
    if uri.startswith("s3://"):
        place = s3.S3Place.parse(f"{uri}/{subdir}")
        whole = s3.is_stored(s3.connect(), place.bucket, f"{place.prefix}{path.name}", path)
    else:
        listed = client.list_artifacts(run_id, subdir or None)
        sizes = {file.path: file.file_size or 0 for file in listed}  # of an empty file, a server says nothing
        whole = sizes.get(name) == path.stat().st_size
    if not whole:
        raise NotStoredError(f"`{name}` did not arrive whole")


def drop_local_checkpoint(client: MlflowClient, run_id: str, path: Path, subdir: str) -> None:
    """Delete the local best checkpoint if a remote store has every byte of it.

    Raises:
        NotStoredError: The stored file differs.
    """
    uri = client.get_run(run_id).info.artifact_uri
    if path.name != CHECKPOINT or uri.startswith(("file:", "/")):
        return
    with tempfile.TemporaryDirectory() as folder, _patience(path.stat().st_size):
        stored = Path(client.download_artifacts(run_id, f"{subdir}/{path.name}", folder))
        same = sha256_of(stored) == sha256_of(path)
    if not same:
        raise NotStoredError(f"`{subdir}/{path.name}` is stored with other bytes")
    path.unlink()


@contextmanager
def _patience(size: int) -> Iterator[None]:
    """Give a large file more time than a small request gets."""
    before = os.environ.get(_TIMEOUT, "10")
    os.environ[_TIMEOUT] = str(int(before) + size // _SLOWEST_BYTES_A_SECOND)
    try:
        yield
    finally:
        os.environ[_TIMEOUT] = before
