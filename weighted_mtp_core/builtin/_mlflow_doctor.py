"""Check login, database and clock of a tracking server, and write and read a file in its artifact store."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

import requests
from mlflow import MlflowClient

from weighted_mtp_core.api import Finding
from weighted_mtp_core.builtin._mlflow_errors import diagnose
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.storage import s3

_TIMEOUT_S = 5
_WORST_SKEW_S = 300.0  # a third of the 15 minutes at which S3 refuses a request
_PROBE = b"written by `doctor`"


def examine_server(uri: str) -> list[Finding]:
    """Check `/health`, login, database and clock of a server; for a database URI, only the database."""
    try:
        if not uri.startswith("http"):
            MlflowClient(uri).search_experiments(max_results=1)
            return [Finding(mark="ok", name="tracking", text=f"the database `{uri}` answers")]
        health = _request("GET", f"{uri.rstrip('/')}/health")
        _request("GET", f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1")
    except Exception as error:  # noqa: BLE001 - whatever it is becomes a line of the checklist
        found = diagnose(error, uri)
        return [Finding(mark="FAILED", name="tracking", text=found.text, hint=found.hint)]
    findings = [Finding(mark="ok", name="tracking", text=f"`{uri}` answers, with login and database")]
    if date := health.headers.get("Date"):
        skew = abs(parsedate_to_datetime(date).timestamp() - time.time())
        findings.append(
            Finding(
                mark="ok" if skew < _WORST_SKEW_S else "FAILED",
                name="clock",
                text=f"{skew:.0f} s between this machine and the server",
                hint=None if skew < _WORST_SKEW_S else "set the clock: S3 refuses requests of another time",
            )
        )
    return findings


def examine_artifacts(uri: str, artifact_root: str | None) -> Iterator[Finding]:
    """Write, read and delete a small file in the place where a new experiment would store its files.

    A place that is neither in S3 nor behind the tracking server gives a warning instead.
    """
    name = f"wmtp-doctor/{uuid.uuid4().hex}.txt"
    try:
        root = artifact_root or MlflowClient(uri).get_experiment("0").artifact_location
        if root.startswith("s3://"):
            _try_s3(root, name)
        elif root.startswith("mlflow-artifacts:"):
            _try_proxy(uri, name)
        else:
            yield Finding(
                mark="warning",
                name="artifacts",
                text=f"the server stores files in `{root}`, which only it can reach",
                hint="start it with --serve-artifacts and --artifacts-destination",
            )
            return
    except WmtpError as error:
        yield Finding(mark="FAILED", name="artifacts", text=str(error), hint=error.hint)
    except Exception as error:  # noqa: BLE001 - whatever it is becomes a line of the checklist
        found = diagnose(error, uri, what="the artifact store of ")
        yield Finding(mark="FAILED", name="artifacts", text=found.text, hint=found.hint)
    else:
        yield Finding(mark="ok", name="artifacts", text=f"a file was stored in `{root}`, read and deleted")


def _try_s3(root: str, name: str) -> None:
    location = s3.S3Location.parse(root)
    client = s3.open_bucket(location.bucket)
    at = {"Bucket": location.bucket, "Key": location.prefix + name}
    client.put_object(**at, Body=_PROBE)
    read = client.get_object(**at)["Body"].read()
    client.delete_object(**at)
    if read != _PROBE:
        raise WmtpError(f"what was read from `{root}` is not what was written")


def _try_proxy(uri: str, name: str) -> None:
    address = f"{uri.rstrip('/')}/api/2.0/mlflow-artifacts/artifacts/{name}"
    _request("PUT", address, data=_PROBE)
    read = _request("GET", address).content
    _request("DELETE", address)
    if read != _PROBE:
        raise WmtpError(f"what was read from the artifact store of `{uri}` is not what was written")


def _request(method: str, address: str, *, data: bytes | None = None) -> requests.Response:
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{part}") for part in ("USERNAME", "PASSWORD"))
    login = (user, password) if user and password else None
    answer = requests.request(method, address, data=data, auth=login, timeout=_TIMEOUT_S)
    answer.raise_for_status()
    return answer
