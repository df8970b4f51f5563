"""S3 and what speaks like it: connect, check a bucket, upload a file and make sure that it arrived.

Credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or boto3's other sources), the endpoint of
an S3-compatible store from MLFLOW_S3_ENDPOINT_URL. boto3 is imported when something is done.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from attrs import frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.storage.manifest import sha256_of

PART_BYTES = 8 * 1024 * 1024  # boto3's own: the ETag of a larger object depends on it
_CHUNK = 1024 * 1024


@frozen
class S3Location:
    """A bucket and a prefix in it, which is empty or ends in `/`."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> S3Location:
        """Read `s3://bucket/prefix`.

        Raises:
            WmtpError: It is something else.
        """
        parts = urlsplit(uri)
        if parts.scheme != "s3" or not parts.netloc:
            raise WmtpError(f"`{uri}` is no place in S3", hint="for example s3://bucket/folder")
        prefix = parts.path.strip("/")
        return cls(parts.netloc, f"{prefix}/" if prefix else "")

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"


def connect() -> Any:
    """Return a boto3 client that gives up after a few seconds on a server that is not there."""
    import boto3
    from botocore.config import Config

    return boto3.Session().client(  # a session of its own: the default one keeps the first credentials it saw
        "s3",
        endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL") or None,
        config=Config(connect_timeout=5, read_timeout=60, retries={"max_attempts": 2, "mode": "standard"}),
    )


def open_bucket(bucket: str) -> Any:
    """Return a client after making sure that the bucket is there and may be read.

    Raises:
        WmtpError: Says which variable to look at.
    """
    from botocore import exceptions

    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    at = f" at `{endpoint}`" if endpoint else ""
    keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    try:
        client = connect()  # finds a half of the credentials wanting
        client.head_bucket(Bucket=bucket)
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise WmtpError(
            f"the bucket `{bucket}`{at} wants {keys}, which are not both set",
            hint="set them in the environment or in `.env`",
        ) from error
    except exceptions.ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status == 404:
            raise WmtpError(
                f"there is no bucket `{bucket}`{at}", hint="create it, or correct the `s3://` address"
            ) from error
        raise WmtpError(
            f"the bucket `{bucket}`{at} refuses {keys} ({status})",
            hint="correct them, or the bucket's policy",
        ) from error
    except exceptions.BotoCoreError as error:
        raise WmtpError(
            f"no S3 server answers{at or ' for the bucket `' + bucket + '`'}",
            hint="check MLFLOW_S3_ENDPOINT_URL and AWS_DEFAULT_REGION",
        ) from error
    return client


def is_stored(client: Any, bucket: str, key: str, path: Path) -> bool:
    """Return whether the object has the file's bytes: by size and ETag, or by reading it back."""
    from botocore.exceptions import ClientError

    try:
        head = client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
            return False
        raise
    if head["ContentLength"] != path.stat().st_size:
        return False
    if head["ETag"].strip('"') == etag(path):
        return True
    # an encrypted bucket, or parts of another size: its ETag says nothing
    body = client.get_object(Bucket=bucket, Key=key)["Body"]
    digest = hashlib.sha256()
    for chunk in body.iter_chunks(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest() == sha256_of(path)


def etag(path: Path) -> str:
    """Return the ETag that S3 gives a file uploaded in parts of `PART_BYTES`."""
    parts = []
    with path.open("rb") as file:
        while chunk := file.read(PART_BYTES):
            parts.append(hashlib.md5(chunk, usedforsecurity=False))
    if len(parts) <= 1 and path.stat().st_size < PART_BYTES:
        return (parts[0] if parts else hashlib.md5(b"", usedforsecurity=False)).hexdigest()
    joined = hashlib.md5(b"".join(part.digest() for part in parts), usedforsecurity=False)
    return f"{joined.hexdigest()}-{len(parts)}"
