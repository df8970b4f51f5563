"""Tracker `core.mlflow`: options, and where a run goes. Importing this module does not import mlflow."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from attrs import Attribute, field, frozen
from attrs import validators as v

from weighted_mtp_core.api import BuildContext, Finding, Tracker
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.redaction import redact
from weighted_mtp_core.tracking.dotenv import use_dotenv
from weighted_mtp_core.tracking.noop import NoopTracker

URI_VARIABLE = "MLFLOW_TRACKING_URI"
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_SCHEME = re.compile(r"(https?|file|sqlite|postgresql(\+\w+)?)://?")
_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def _is_uri(instance: object, attribute: Attribute[str | None], value: str | None) -> None:
    del instance, attribute
    if value is not None:
        try:
            check_uri(value)
        except WmtpError as error:
            raise ValueError(str(error)) from error


@frozen(kw_only=True)
class MlflowOptions:
    """`[tracker.options]` of `core.mlflow`.

    Attributes:
        tracking_uri: The server or store; else MLFLOW_TRACKING_URI from the environment or `.env`; else
            `<storage>/mlflow.db`.
        experiment_prefix: The experiment is `<experiment_prefix>/<weighting plugin>`.
        artifact_root: Where a new experiment keeps files; else the server's default, or `mlartifacts`
            beside a local store.
        keep_local: False deletes `checkpoints/best_model.pt` from the run folder once a remote artifact
            store has every byte of it.
        enabled: False leaves the run untracked, but for its run folder.
    """

    tracking_uri: str | None = field(default=None, validator=_is_uri)
    experiment_prefix: str = field(
        default="weighted_mtp", validator=v.matches_re(f"{_SEGMENT}(/{_SEGMENT})*")
    )
    artifact_root: str | None = None
    keep_local: bool = True
    enabled: bool = True


def build_mlflow(options: MlflowOptions, context: BuildContext) -> Tracker:
    """Build the tracker; nothing is contacted yet.

    Raises:
        WmtpError: The tracking URI cannot be used.
    """
    if not options.enabled:
        return NoopTracker()
    use_dotenv()
    uri = options.tracking_uri or os.environ.get(URI_VARIABLE) or embedded_uri(context.storage)
    check_uri(uri)
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    from weighted_mtp_core.builtin._mlflow_tracker import MlflowTracker  # reads some of them when imported

    return MlflowTracker(uri=uri, artifact_root=options.artifact_root, keep_local=options.keep_local)


def examine_mlflow(options: MlflowOptions, storage: Path) -> Iterator[Finding]:
    """Try the store or server that a run would use: login, database, clock, and a file in and out."""
    if not options.enabled:
        yield Finding(mark="warning", name="tracking", text="is switched off (`enabled = false`)")
        return
    uri = options.tracking_uri or os.environ.get(URI_VARIABLE) or embedded_uri(storage)
    try:
        check_uri(uri)
    except WmtpError as error:
        yield Finding(mark="FAILED", name="tracking", text=str(error), hint=error.hint)
        return
    path = local_path(uri)
    if path is not None:
        yield _examine_local_store(uri, path)
        return
    from weighted_mtp_core.builtin._mlflow_doctor import examine_artifacts, examine_server

    server = examine_server(uri)
    yield from server
    if any(finding.mark == "FAILED" for finding in server):
        return
    yield from examine_artifacts(uri, options.artifact_root)


def _examine_local_store(uri: str, path: Path) -> Finding:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(path if path.exists() else folder, os.W_OK):
        return Finding(mark="FAILED", name="tracking", text=f"the store `{uri}` cannot be written")
    return Finding(mark="ok", name="tracking", text=f"the store `{uri}`")


def embedded_uri(storage: Path) -> str:
    """Return the store that is used when nothing is configured."""
    return f"sqlite:///{storage.absolute() / 'mlflow.db'}"


def check_uri(uri: str) -> None:
    """Refuse a tracking URI that MLflow would misunderstand, or that holds a password.

    Raises:
        WmtpError: It has another scheme, or user and password in it.
    """
    if not _SCHEME.match(uri):
        raise WmtpError(
            f"`{redact(uri)}` is no tracking URI",
            hint="for example https://mlflow.example.org, sqlite:////data/mlflow.db, file:///tmp/mlflow or "
            "postgresql+psycopg2://user@host/mlflow",
        )
    parts = urlsplit(uri)
    web = parts.scheme in {"http", "https"}
    if parts.password is not None or (web and parts.username is not None):
        raise WmtpError(
            f"the tracking URI `{redact(uri)}` holds a user or a password, which MLflow would print",
            hint="take it out of the URI and set "
            + (
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment or in `.env`"
                if web
                else "PGPASSWORD in the environment, or write it into ~/.pgpass"
            ),
        )


def local_path(uri: str) -> Path | None:
    """Return the file or folder of a `sqlite:` or `file:` URI; None for a server."""
    scheme, _, rest = uri.partition(":")
    if scheme == "sqlite":
        return Path(rest.removeprefix("///")).absolute()
    if scheme == "file":
        return Path(rest.removeprefix("//").removeprefix("localhost")).absolute()
    return None
