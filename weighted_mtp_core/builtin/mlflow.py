"""The options, the build function and the checks of the tracker `core.mlflow`, without importing mlflow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from attrs import Attribute, field, frozen
from attrs import validators as v

from weighted_mtp_core.api import BuildContext, Finding, Tracker
from weighted_mtp_core.builtin._mlflow_uri import check_uri, local_path, resolve_uri
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.tracking.dotenv import use_dotenv
from weighted_mtp_core.tracking.noop import NoopTracker

_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
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
    """The options of the tracker `core.mlflow`, from the table `[tracker.options]` of a recipe.

    Attributes:
        tracking_uri: URI of the tracking server or store. The default is MLFLOW_TRACKING_URI from the
            environment or `.env`; if this variable is not set, the default is `<storage>/mlflow.db`.
        experiment_prefix: The run belongs to the experiment `<experiment_prefix>/<weighting plugin>`, unless
            the recipe sets `run.experiment` or an earlier tracker has this option.
        artifact_root: URI under which a new experiment stores files. By default, a server chooses the place,
            files of an SQLite store are in the folder `mlartifacts` next to it, files of a `file:` store are
            inside the store, and files of a PostgreSQL store are in `mlruns` in the working folder.
        keep_local: If false, `checkpoints/best_model.pt` is deleted from the run folder as soon as a remote
            artifact store has an identical copy.
        enabled: If false, the tracker sends nothing; the run folder still contains all data of the run.
    """

    tracking_uri: str | None = field(default=None, validator=_is_uri)
    experiment_prefix: str = field(
        default="weighted_mtp", validator=v.matches_re(f"{_SEGMENT}(/{_SEGMENT})*")
    )
    artifact_root: str | None = None
    keep_local: bool = True
    enabled: bool = True


def build_mlflow(options: MlflowOptions, context: BuildContext) -> Tracker:
    """Build the tracker `core.mlflow` without contacting a server.

    Raises:
        WmtpError: The tracking URI cannot be used, or `.env` cannot be read.
    """
    if not options.enabled:
        return NoopTracker()
    use_dotenv()
    uri = resolve_uri(options.tracking_uri, context.storage)
    check_uri(uri)
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    from weighted_mtp_core.builtin._mlflow_tracker import MlflowTracker  # mlflow reads the settings on import

    return MlflowTracker(uri=uri, artifact_root=options.artifact_root, keep_local=options.keep_local)


def examine_mlflow(options: MlflowOptions, storage: Path) -> Iterator[Finding]:
    """Check that a local store can be written, or check a server's login, database, clock and artifact store.

    Raises:
        WmtpError: The store would be `<storage>/mlflow.db`, but no URI can contain this path.
    """
    if not options.enabled:
        yield Finding(mark="warning", name="tracking", text="is switched off (`enabled = false`)")
        return
    uri = resolve_uri(options.tracking_uri, storage)
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
    if not any(finding.mark == "FAILED" for finding in server):
        yield from examine_artifacts(uri, options.artifact_root)


def _examine_local_store(uri: str, path: Path) -> Finding:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(path if path.exists() else folder, os.W_OK):
        return Finding(mark="FAILED", name="tracking", text=f"the store `{uri}` cannot be written")
    return Finding(mark="ok", name="tracking", text=f"the store `{uri}`")
