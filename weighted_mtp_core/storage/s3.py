"""Connect to S3 and compatible stores, check buckets, and verify that files were stored.

The credentials are in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or in boto3's other sources. The endpoint
of an S3-compatible store is in MLFLOW_S3_ENDPOINT_URL. boto3 is imported on first use.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any

from attrs import frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.redaction import redact
from weighted_mtp_core.storage.manifest import sha256_of, sha256_of_chunks

PART_BYTES = 8 * 1024 * 1024  # boto3's default; the ETag of a larger object depends on it
_CHUNK = 1024 * 1024


@frozen
class S3Location:
    """A bucket and a prefix of keys in this bucket; the prefix is empty or ends in `/`."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> S3Location:
        """Parse `s3://bucket/prefix`.

        Raises:
            WmtpError: The URI does not have the form `s3://bucket/prefix`.
        """
        scheme, _, rest = uri.partition("://")
        bucket, _, prefix = rest.partition("/")  # not parsed as a URL, because keys may contain `#` and `?`
        if scheme != "s3" or not bucket:
            raise WmtpError(f"`{uri}` is not an S3 location", hint="for example s3://bucket/folder")
        prefix = prefix.strip("/")
        return cls(bucket, f"{prefix}/" if prefix else "")

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"


def connect() -> Any:
    """Return a boto3 client with time limits of 5 s to connect and 60 s to read, and at most two retries.

    Raises:
        WmtpError: The endpoint in MLFLOW_S3_ENDPOINT_URL is not a valid URL.
        PartialCredentialsError: Only one of the two credentials is set.
    """
    import boto3
    from botocore.config import Config

    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    if endpoint and not re.match(r"https?://[^/]", endpoint):
        raise WmtpError(
            f"MLFLOW_S3_ENDPOINT_URL is `{redact(endpoint)}`, which is not a valid URL",
            hint=f"begin it with http:// or https://, for example http://{redact(endpoint).lstrip(':/')}",
        )
    return boto3.Session().client(  # a new session, because the default session keeps its first credentials
        "s3",
        endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL") or None,
        config=Config(connect_timeout=5, read_timeout=60, retries={"max_attempts": 2, "mode": "standard"}),
    )


def open_bucket(bucket: str) -> Any:
    """Return a client, after checking that the bucket exists and can be read.

    Raises:
        WmtpError: The endpoint is not a valid URL, or the bucket does not exist or cannot be
            reached or read.
    """
    from botocore import exceptions

    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    at = f" at `{endpoint}`" if endpoint else ""
    keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    try:
        client = connect()  # raises an exception if only one of the two credentials is set
        client.head_bucket(Bucket=bucket)
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise WmtpError(
            f"the bucket `{bucket}`{at} needs {keys}, which are not both set",
            hint="set them in the environment or in `.env`",
        ) from error
    except exceptions.ClientError as error:
        if _status(error) == 404:
            raise WmtpError(
                f"there is no bucket `{bucket}`{at}", hint="create it, or correct the `s3://` address"
            ) from error
        text, hint = advice(error) or (
            f"refuses {keys} ({_status(error)})",
            "correct them, the bucket's policy, or the clock of this machine",
        )
        raise WmtpError(f"the bucket `{bucket}`{at} {text}", hint=hint) from error
    except exceptions.BotoCoreError as error:
        raise WmtpError(
            f"no S3 server answers{at or ' for the bucket `' + bucket + '`'}",
            hint="check MLFLOW_S3_ENDPOINT_URL and AWS_DEFAULT_REGION",
        ) from error
    return client


def head(client: Any, bucket: str, key: str) -> Mapping[str, Any] | None:
    """Return the size, ETag and metadata of an object, or None if the object does not exist.

    Raises:
        WmtpError: The store refuses the request for a reason that `advice` explains.
        ClientError: The store refuses the request for another reason.
        BotoCoreError: The store cannot be reached.
    """
    from botocore.exceptions import ClientError

    try:
        found: Mapping[str, Any] = client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if _status(error) == 404:
            return None
        if refused := advice(error):
            raise WmtpError(f"the bucket `{bucket}` {refused[0]}", hint=refused[1]) from error
        raise
    return found


_ADVICE = (
    (
        r"x-amz-(sdk-)?(checksum|trailer)",
        "does not support the checksum headers of this boto3",
        "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required in the environment",
    ),
    (
        r"StorageFull|InsufficientStorage|QuotaExceeded|\b507\b",
        "is full",
        "free space in the store, or raise its quota; what is uploaded stays",
    ),
    (
        r"RequestTimeTooSkewed",
        "refuses the time of the request",
        "set the clock of this machine; the store allows 15 minutes",
    ),
    (
        r"PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint|\b301\b",
        "is in another region",
        "set AWS_DEFAULT_REGION to the region of the bucket",
    ),
    (
        r"\((403|AccessDenied|Forbidden)\) when calling the HeadObject",
        "does not let these keys look at objects (HeadObject)",
        "allow s3:GetObject on the objects and s3:ListBucket on the bucket; docs/tracking/bucket-policy.json",
    ),
)
_WORST_SKEW_S = 900  # S3 refuses a request whose time is wrong by 15 minutes


def advice(error: BaseException) -> tuple[str, str] | None:
    """Return why a store refused a request and what the user can do; None if the exception is not known."""
    each: BaseException | None = error
    while each is not None:
        answer = getattr(each, "response", None)
        headers = (
            answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}) if isinstance(answer, dict) else {}
        )
        if (region := headers.get("x-amz-bucket-region")) and _status(each) in {301, 400}:
            return f"is in the region `{region}`", f"set AWS_DEFAULT_REGION={region}"
        if "date" in headers:
            skew = abs(parsedate_to_datetime(headers["date"]).timestamp() - time.time())
            if _status(each) == 403 and skew > _WORST_SKEW_S:
                return (
                    f"refuses requests that are {skew / 60:.0f} minutes off",
                    "set the clock of this machine",
                )
        for pattern, text, hint in _ADVICE:
            if re.search(pattern, f"{each}"):
                return text, hint
        each = each.__cause__ or each.__context__
    return None


def _status(error: Any) -> int | None:
    status: int | None = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def is_stored(client: Any, bucket: str, key: str, path: Path) -> bool:
    """Return whether a stored object equals a file, by its size and ETag or by reading the object."""
    found = head(client, bucket, key)
    if found is None or found["ContentLength"] != path.stat().st_size:
        return False
    if found["ETag"].strip('"') == etag(path):
        return True
    # in an encrypted bucket, or after an upload in parts of another size, ETags cannot be compared
    body = client.get_object(Bucket=bucket, Key=key)["Body"]
    return sha256_of_chunks(body.iter_chunks(_CHUNK)) == sha256_of(path)


def etag(path: Path) -> str:
    """Return the ETag that an object gets if the file is uploaded in parts of `PART_BYTES`."""
    md5 = partial(hashlib.md5, usedforsecurity=False)
    with path.open("rb") as file:
        parts = [md5(chunk).digest() for chunk in iter(partial(file.read, PART_BYTES), b"")]
    if path.stat().st_size < PART_BYTES:
        return (parts or [md5(b"").digest()])[0].hex()
    return f"{md5(b''.join(parts)).hexdigest()}-{len(parts)}"
