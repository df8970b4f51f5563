"""The tracking URI: which one a run uses, and which ones are refused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.redaction import redact

_SCHEME = re.compile(r"(https?|file|sqlite|postgresql(\+\w+)?)://?")


def resolve_uri(option: str | None, storage: Path) -> str:
    """Return the option, or MLFLOW_TRACKING_URI, or the store `<storage>/mlflow.db`."""
    local = f"sqlite:///{storage.absolute() / 'mlflow.db'}"
    return option or os.environ.get("MLFLOW_TRACKING_URI") or local


def check_uri(uri: str) -> None:
    """Refuse a tracking URI that MLflow would misinterpret, or that contains a password.

    Raises:
        WmtpError: It has another scheme, or a user or password.
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
            hint="remove it from the URI and set "
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
