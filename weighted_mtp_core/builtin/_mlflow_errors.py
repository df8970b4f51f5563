"""Explain an exception of MLflow's client in one line, and decide whether a retry can help.

MLflow raises the same class for all errors; the cause is in the status code, in the text or in a chained
exception. The explanation leaves out URLs with secrets and the bodies of responses, such as nginx's HTML.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from attrs import evolve, frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.redaction import redact
from weighted_mtp_core.storage import s3

_STATUS = re.compile(
    r"error code (\d{3}) != |\b(\d{3}) (?:Client|Server) Error|too many (\d{3}) error responses"
)
_MALFORMED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
# MLflow's server reports these errors as bad requests too, but a retry finds the row that another client
# wrote, or a free connection
_CROWDED = re.compile(r"UniqueViolation|UNIQUE constraint failed|Duplicate entry|QueuePool limit")
_LOGIN = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


class NotDeliveredError(Exception):
    """The store did not accept the data, but a retry may succeed."""


@frozen(kw_only=True)
class Diagnosis:
    """The cause of a failed request.

    Attributes:
        text: The cause in one line.
        hint: What the user can do about the failure; None if nothing is known or the failure may be
            temporary.
        hopeless: Whether the same request will never succeed.
    """

    text: str
    hint: str | None = None
    hopeless: bool = False

    @property
    def lasting(self) -> bool:
        """Whether the failure is probably permanent, so that it stops a run at its start (but not later)."""
        return self.hint is not None

    def as_error(self) -> WmtpError:
        """Return the error that stops a run because of this failure."""
        return WmtpError(self.text, hint=self.hint)


def diagnose(error: BaseException, uri: str, *, what: str = "") -> Diagnosis:
    """Return the cause of an exception from MLflow, requests, botocore or a database driver.

    Args:
        error: The exception.
        uri: The tracking URI.
        what: The part of the server that failed, such as "the artifact store of "; may be empty.
    """
    found = _diagnose(error)
    server = "the tracking server" if uri.startswith("http") else "the MLflow store"
    return evolve(found, text=found.text.replace("{server}", f"{what}{server} `{redact(uri)}`"))


def _diagnose(error: BaseException) -> Diagnosis:
    text = " ".join(f"{type(each).__name__} {each}" for each in causes(error))
    if is_crowded(error):
        return Diagnosis(text="{server} is overloaded by other clients")
    if getattr(error, "error_code", "") in _MALFORMED and "'active' state" not in text:
        return Diagnosis(text=f"{{server}} refuses it: {_first_line(error)}", hopeless=True)
    if any(type(each).__module__.startswith(("botocore.", "boto3.")) for each in causes(error)) and (
        refused := s3.advice(error)
    ):
        return Diagnosis(text=f"{{server}} {refused[0]}", hint=refused[1])
    status = http_status(error)
    if status is not None:
        return _diagnose_status(status, str(error))
    for pattern, diagnosis in _NETWORK.items():
        if re.search(pattern, text):
            return diagnosis
    return Diagnosis(text=f"{{server}}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    lines = redact(str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


_NETWORK = {
    r"NameResolutionError|Name or service not known|getaddrinfo|name resolution|nodename nor": Diagnosis(
        text="the host of {server} is not known",
        hint="check the host in MLFLOW_TRACKING_URI or `tracking_uri`",
    ),
    r"SSLError|CERTIFICATE_VERIFY_FAILED|WRONG_VERSION_NUMBER": Diagnosis(
        text="no secure connection to {server}: an unknown certificate, or no TLS there",
        hint="check `https://` in MLFLOW_TRACKING_URI; for an own certificate set REQUESTS_CA_BUNDLE",
    ),
    r"Connection refused|ECONNREFUSED|Could not connect to the endpoint URL": Diagnosis(
        text="nothing answers at {server}",
        hint="start it, correct MLFLOW_TRACKING_URI, or run untracked with `enabled = false`",
    ),
    r"No module named|NoSuchModuleError": Diagnosis(
        text="no database driver for {server} is installed",
        hint="install one and name it, for example postgresql+psycopg2://user@host/mlflow",
    ),
    r"password authentication failed|no password supplied": Diagnosis(
        text="{server} refuses the login",
        hint="set PGPASSWORD in the environment, or write the password into ~/.pgpass",
    ),
    r"(?i)timed? ?out|timeout": Diagnosis(text="{server} did not answer in time"),
    r"(?i)connection|RemoteDisconnected|reset by peer": Diagnosis(text="the connection to {server} broke"),
}
_STATUSES = {
    401: Diagnosis(
        text=f"{{server}} refuses the login in {_LOGIN}", hint="correct them in the environment or in `.env`"
    ),
    403: Diagnosis(text="{server} forbids this (403)", hint=f"check {_LOGIN}"),
    404: Diagnosis(
        text="{server} is not an MLflow server (404)", hint="check the path in MLFLOW_TRACKING_URI"
    ),
    413: Diagnosis(
        text="{server} refuses a request of this size (413)",
        hint="raise `client_max_body_size` in nginx (0 means no limit), then run `track sync`",
        hopeless=True,
    ),
    429: Diagnosis(text="{server} is overloaded (429)"),
    502: Diagnosis(text="{server} is not running behind its proxy (502)"),
    503: Diagnosis(text="{server} is not available (503)"),
}
_NO_LOGIN = Diagnosis(
    text=f"{{server}} requires a login, but {_LOGIN} are not both set",
    hint="set them in the environment or in `.env`",
)
_HOST_NAME = Diagnosis(
    text="{server} refuses requests for this host name (403)",
    hint="add the host, and host:port, to `--allowed-hosts` of `mlflow server`",
)


def _diagnose_status(status: int, text: str) -> Diagnosis:
    logged_in = os.environ.get("MLFLOW_TRACKING_USERNAME") and os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if status == 401 and not logged_in:
        return _NO_LOGIN
    if status == 403 and "Invalid Host" in text:
        return _HOST_NAME
    if status in _STATUSES and not (status == 404 and "RESOURCE_DOES_NOT_EXIST" in text):
        return _STATUSES[status]
    return Diagnosis(text=f"{{server}} failed ({status})")


def is_crowded(error: BaseException) -> bool:
    """Return whether other clients caused the error by writing the same row or using all connections."""
    return any(_CROWDED.search(str(each)) for each in causes(error))


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an exception, one of its causes or their messages contain; else None."""
    for each in causes(error):
        response = getattr(each, "response", None)
        if response is not None and isinstance(getattr(response, "status_code", None), int):
            return int(response.status_code)
        if found := _STATUS.search(str(each)):
            return int(next(filter(None, found.groups())))
        if type(each).__name__ == "RestException":
            return int(each.get_http_status_code())  # type: ignore[attr-defined]
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, then its cause, then the cause of its cause, and so on."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or each.__context__
