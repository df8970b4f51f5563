"""Chooses the tracking URI of a run and refuses invalid URIs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.redaction import redact

_SCHEME = re.compile(r"(https?://|file:/|sqlite://|postgresql(\+\w+)?://)")


def resolve_uri(option: str | None, storage: Path) -> str:
    """Return the tracking URI: the option if set, otherwise MLFLOW_TRACKING_URI or `<storage>/mlflow.db`.

    Raises:
        WmtpError: The path `<storage>/mlflow.db` is used, but contains a character that a URI cannot contain.
    """
    return option or os.environ.get("MLFLOW_TRACKING_URI") or _store_in(storage)


def _store_in(storage: Path) -> str:
    """Return the URI of the store in a folder; its path is relative if the absolute path is not valid."""
    path = str(storage.absolute() / "mlflow.db")
    if set("?#%") & set(path):
        path = os.path.relpath(path)
    if set("?#%") & set(path):
        raise WmtpError(
            f"the storage folder `{storage}` has `?`, `#` or `%` in its name, which no MLflow store can have",
            hint="choose another `run.storage`, or set MLFLOW_TRACKING_URI",
        )
    return f"sqlite:///{path}"


def check_uri(uri: str) -> None:
    """Refuse a tracking URI that MLflow would misinterpret or that contains a login.

    Raises:
        WmtpError: The URI has an unknown scheme, contains a password or (for a web server) a user name, or
            belongs to a local store but does not name a file.
    """
    if not _SCHEME.match(uri):
        raise WmtpError(
            f"`{redact(uri)}` is not a tracking URI",
            hint="for example https://mlflow.example.org, sqlite:////data/mlflow.db, file:///tmp/mlflow or "
            "postgresql+psycopg2://user@host/mlflow",
        )
    if uri.startswith(("sqlite:", "file:")):
        _check_file(uri)
    parts = urlsplit(uri)
    web = parts.scheme in {"http", "https"}
    if parts.password is not None or (web and parts.username is not None):
        raise WmtpError(
            f"the tracking URI `{redact(uri)}` holds a user or a password, which MLflow would print",
            hint="remove it from the URI and set "
            + (
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment or in `.env`"
                if web
                else "PGPASSWORD in the environment, or write it into ~/.pgpass"
            ),
        )


def _check_file(uri: str) -> None:
    scheme, _, rest = uri.partition(":")
    path, _, query = rest.partition("?")
    home = Path.home()
    if re.match(r"/*~", path):
        whole = re.sub(r"^/*~", str(home), path)
        raise WmtpError(
            f"`{uri}` begins with `~`, which is not expanded",
            hint=f"write the whole path: {scheme}:///{whole}",
        )
    if scheme == "sqlite" and (path.strip("/") in {"", ":memory:"} or "mode=memory" in query):
        raise WmtpError(
            f"`{uri}` is a database in memory, which ends with the run",
            hint="name a file: sqlite:////data/mlflow.db",
        )
    netloc = "" if path.startswith("///") or not path.startswith("//") else path[2:].partition("/")[0]
    if netloc not in {"", "localhost"} or (
        scheme == "sqlite" and ("%" in path or not path.startswith("///"))
    ):
        raise WmtpError(
            f"`{uri}` does not name a file",
            hint=f"write three slashes and the path as it is: {scheme}:////data/mlflow",
        )


def local_path(uri: str) -> Path | None:
    """Return the file or folder of a `sqlite:` or `file:` URI; None for other URIs."""
    scheme, _, rest = uri.partition(":")
    if scheme == "sqlite":
        return Path(rest.partition("?")[0].removeprefix("///")).absolute()
    if scheme == "file":
        return Path(unquote(urlsplit(uri).path)).absolute()
    return None
