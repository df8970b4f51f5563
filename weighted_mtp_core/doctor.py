"""The operations checklist: what a run needs, tried for real, one line each. Never shows a secret."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from attrs import frozen

from weighted_mtp_core.builtin.mlflow import URI_VARIABLE, MlflowOptions, check_uri, embedded_uri, local_path
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.plugins.loading import find, load
from weighted_mtp_core.tracking.environment import DotEnv, load_dotenv

Mark = Literal["ok", "warning", "FAILED"]

_LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_LITTLE_DISK, _LEAST_DISK = 10e9, 1e9  # bytes: a checkpoint of a small model, and room to breathe


@frozen(kw_only=True)
class Finding:
    """One line of the checklist."""

    mark: Mark
    name: str
    text: str
    hint: str | None = None


def examine(options: MlflowOptions, storage: Path) -> Iterator[Finding]:
    """Yield what is found, cheap things first.

    Args:
        options: Of the tracker `core.mlflow` that a run would use.
        storage: The storage root.
    """
    yield from _environment(load_dotenv())
    yield from _plugins()
    yield _disk(storage)
    yield _device()
    if not options.enabled:
        yield Finding(mark="warning", name="tracking", text="is switched off (`enabled = false`)")
        return
    uri = options.tracking_uri or os.environ.get(URI_VARIABLE) or embedded_uri(storage)
    yield from _tracking(uri, options)


def _environment(found: DotEnv | None) -> Iterator[Finding]:
    if found is None:
        yield Finding(mark="ok", name=".env", text="none; only the environment is read")
    else:
        taken = ", ".join(found.taken) or "nothing that the environment does not set"
        yield Finding(mark="ok", name=".env", text=f"gives {taken}")
        if found.ignored:
            yield Finding(mark="warning", name=".env", text=f"is not read for {', '.join(found.ignored)}")
        if found.exposed:
            yield Finding(
                mark="warning", name=".env", text="can be read by others", hint=f"chmod 600 {found.path}"
            )
    for names in (_LOGIN, _S3_KEYS):
        given = [name for name in names if os.environ.get(name)]
        if len(given) == 1:
            lacking = next(name for name in names if name not in given)
            yield Finding(mark="FAILED", name="environment", text=f"{given[0]} is set, but {lacking} is not")


def _plugins() -> Iterator[Finding]:
    for name, plugin in find().items():
        try:
            load(find(), [name])
        except WmtpError as error:
            yield Finding(mark="warning", name="plugin", text=str(error), hint=error.hint)
        else:
            yield Finding(mark="ok", name="plugin", text=f"{name} ({plugin.distribution} {plugin.version})")


def _disk(storage: Path) -> Finding:
    place = storage.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.0f} GB free at `{place}`"
    if not os.access(place, os.W_OK):
        return Finding(mark="FAILED", name="storage", text=f"`{place}` cannot be written")
    mark: Mark = "FAILED" if free < _LEAST_DISK else "warning" if free < _LITTLE_DISK else "ok"
    return Finding(mark=mark, name="disk", text=text)


def _device() -> Finding:
    from weighted_mtp_core.runtime.device import resolve_device, resolve_dtype

    device = resolve_device("auto")
    return Finding(mark="ok", name="device", text=f"{device}, {resolve_dtype('auto', device)}")


def _tracking(uri: str, options: MlflowOptions) -> Iterator[Finding]:
    try:
        check_uri(uri)
    except WmtpError as error:
        yield Finding(mark="FAILED", name="tracking", text=str(error), hint=error.hint)
        return
    path = local_path(uri)
    if path is not None:
        yield _local_store(uri, path)
        return
    from weighted_mtp_core.builtin._mlflow_doctor import examine_artifacts, examine_server

    server = examine_server(uri)
    yield from server
    if any(finding.mark == "FAILED" for finding in server):
        return
    yield from examine_artifacts(uri, options.artifact_root)


def _local_store(uri: str, path: Path) -> Finding:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(path if path.exists() else folder, os.W_OK):
        return Finding(mark="FAILED", name="tracking", text=f"the store `{uri}` cannot be written")
    return Finding(mark="ok", name="tracking", text=f"the store `{uri}`")
