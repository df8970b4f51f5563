"""Check the artifact store of a run, store files in it, verify them, and delete a local checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import augmented_raise_for_status, http_request

from weighted_mtp_core.storage import s3
from weighted_mtp_core.storage.manifest import sha256_of, sha256_of_chunks

CHECKPOINT = "best_model.pt"
_PROXIED = "mlflow-artifacts:"
_CHUNK = 1024 * 1024
_SLOWEST_BYTES_A_SECOND = 1_000_000


class NotStoredError(Exception):
    """A stored file is missing or differs from the file that was sent."""


def check_store(client: MlflowClient, run_id: str) -> None:
    """Check before training that the artifact store of a run can be reached.

    Raises:
        WmtpError: The S3 bucket does not exist or cannot be used.
        Exception: MLflow's client raised this exception, for example because the server cannot reach its
            store.
    """
    uri = client.get_run(run_id).info.artifact_uri
    if uri.startswith("s3://"):
        s3.open_bucket(s3.S3Location.parse(uri).bucket)
    else:
        client.list_artifacts(run_id)  # fails if the server cannot reach its store


def store(client: MlflowClient, run_id: str, path: Path, subdir: str, *, uri: str) -> None:
    """Upload a file, then verify its bytes if S3 is accessed directly, and otherwise only its size.

    Raises:
        NotStoredError: The stored file is missing or differs from the local file, which must be sent again.
        Exception: The client of MLflow or of S3 raised this exception.
    """
    root = client.get_run(run_id).info.artifact_uri
    name = f"{subdir}/{path.name}" if subdir else path.name
    if root.startswith(_PROXIED):
        with path.open("rb") as file:
            _request(uri, f"{root}/{name}", "PUT", size=path.stat().st_size, data=file)
    else:
        client.log_artifact(run_id, str(path), subdir or None)
    if root.startswith("s3://"):
        location = s3.S3Location.parse(f"{root}/{subdir}")
        whole = s3.is_stored(s3.connect(), location.bucket, f"{location.prefix}{path.name}", path)
    else:
        listed = client.list_artifacts(run_id, subdir or None)
        sizes = {file.path: file.file_size or 0 for file in listed}  # servers give no size for an empty file
        whole = sizes.get(name) == path.stat().st_size
    if not whole:
        raise NotStoredError(f"`{name}` did not arrive whole")


def drop_local_checkpoint(client: MlflowClient, run_id: str, path: Path, subdir: str, *, uri: str) -> None:
    """Delete the local file `best_model.pt` after `store`, if a remote store has an identical copy.

    The local file is kept if it has another name, or if files go neither to S3 nor through the server.

    Raises:
        NotStoredError: The stored file differs from the local file, which is kept.
        Exception: The client of MLflow raised this exception.
    """
    root = client.get_run(run_id).info.artifact_uri
    if path.name != CHECKPOINT or not root.startswith((_PROXIED, "s3://")):
        return
    if root.startswith(_PROXIED):
        name = f"{subdir}/{path.name}"
        answer = _request(uri, f"{root}/{name}", "GET", size=path.stat().st_size, stream=True)
        if sha256_of_chunks(answer.iter_content(_CHUNK)) != sha256_of(path):
            raise NotStoredError(f"`{name}` is stored with other bytes")
    path.unlink()


def _request(uri: str, address: str, method: str, *, size: int, **body: Any) -> requests.Response:
    """Send a request for a file that the tracking server stores, with a timeout that fits the file's size.

    The server answers only after its store has the file. For a large file, the answer takes longer than the
    timeout of MLflow's own requests. MLflow's timeout cannot be changed for one file, because it is an
    environment variable and therefore the same for all threads.
    """
    folder, _, name = address.rpartition("/")
    creds = get_default_host_creds(MlflowArtifactsRepository.resolve_uri(folder, uri))
    timeout = int(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")) + size // _SLOWEST_BYTES_A_SECOND
    answer: requests.Response = http_request(creds, f"/{name}", method, timeout=timeout, **body)
    augmented_raise_for_status(answer)
    return answer
