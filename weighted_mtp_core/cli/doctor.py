"""Check what a run needs on this machine.

The command checks .env, plugins, disk and device. The command also checks what components need, such as a
sandbox, or a tracking server with its login, its artifact store and a correct clock. With a recipe, the
command checks the components of the recipe; without a recipe, it checks the components of all installed
plugins with default options, except components with a required option. The command shows no secret. The exit
code is 1 if a check fails; warnings do not change the exit code.

examples:
  doctor                               everything that is installed
  doctor configs/my_recipe.toml        the components of a recipe, with its options
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import attrs

from weighted_mtp_core.api import Finding
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.exit_codes import EXIT_DONE, EXIT_RUN_FAILED
from weighted_mtp_core.messages import reason
from weighted_mtp_core.plan import Plan, make_plan
from weighted_mtp_core.plugins.discovery import metadata_faults
from weighted_mtp_core.plugins.loading import AnyComponent, LoadedPlugin, PluginRegistry
from weighted_mtp_core.plugins.selection import SelectedComponent
from weighted_mtp_core.redaction import redact
from weighted_mtp_core.tracking.dotenv import DotEnv, load_dotenv

_TICKS = {"ok": "✓", "warning": "!", "FAILED": "✗"}

_LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_LITTLE_DISK, _LEAST_DISK = 10e9, 1e9  # bytes; a small model's checkpoint fits into 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", type=Path, help="a TOML file")


def main(args: argparse.Namespace) -> int:
    code = EXIT_DONE
    seen = set()
    for finding in _examine(None if args.recipe is None else make_plan(args.recipe)):
        if finding in seen:
            continue
        seen.add(finding)
        line = f"{_TICKS[finding.mark]} {finding.mark:<7} {finding.name}: {finding.text}"
        print(redact(line), flush=True)
        if finding.hint:
            print(redact(f"          hint: {finding.hint}"))
        if finding.mark == "FAILED":
            code = EXIT_RUN_FAILED
    return code


def _examine(plan: Plan | None) -> Iterator[Finding]:
    """Yield all findings; without a plan, every installed component without required options is checked."""
    storage = Path("storage" if plan is None else plan.recipe.run.storage)
    try:
        yield from _environment(load_dotenv())
    except WmtpError as error:
        yield Finding(mark="FAILED", name=".env", text=str(error), hint=error.hint)
    loaded: list[LoadedPlugin] = []
    yield from _plugins(loaded)
    yield _disk(storage)
    yield _device(plan)
    for component, options in _of_installed(loaded) if plan is None else _of_plan(plan):
        if component.examine is None:
            continue
        try:
            yield from component.examine(options, storage)
        except WmtpError as error:
            yield Finding(mark="FAILED", name=component.name, text=str(error), hint=error.hint)
        except Exception as error:  # noqa: BLE001 - whatever it is becomes a line of the checklist
            yield Finding(mark="FAILED", name=component.name, text=reason(error))
    if plan is not None and not plan.trackers:
        yield Finding(mark="warning", name="tracking", text="the recipe names no tracker")


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
                mark="warning",
                name=".env",
                text="can be read by others",
                hint=shlex.join(["chmod", "600", str(found.path)]),
            )
    for names in (_LOGIN, _S3_KEYS):
        given = [name for name in names if os.environ.get(name)]
        if len(given) == 1:
            lacking = next(name for name in names if name not in given)
            yield Finding(mark="FAILED", name="environment", text=f"{given[0]} is set, but {lacking} is not")


def _plugins(loaded: list[LoadedPlugin]) -> Iterator[Finding]:
    """Yield a finding for each fault of metadata and each plugin; append usable plugins to `loaded`."""
    for fault in metadata_faults():
        yield Finding(mark="warning", name="package", text=fault, hint="install that package again")
    registry = PluginRegistry()
    for name, plugin in registry.found.items():
        try:
            loaded.append(registry.load(name))
        except WmtpError as error:
            yield Finding(mark="warning", name="plugin", text=str(error), hint=error.hint)
        else:
            yield Finding(mark="ok", name="plugin", text=f"{name} ({plugin.distribution} {plugin.version})")


def _disk(storage: Path) -> Finding:
    folder = storage.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Finding(mark="FAILED", name="storage", text=f"`{folder}` cannot be written")
    mark: Literal["ok", "warning", "FAILED"] = (
        "FAILED" if free < _LEAST_DISK else "warning" if free < _LITTLE_DISK else "ok"
    )
    return Finding(mark=mark, name="disk", text=f"{free / 1e9:.0f} GB free at `{folder}`")


def _device(plan: Plan | None) -> Finding:
    from weighted_mtp_core.runtime.device import Compute

    device, dtype = ("auto", "auto") if plan is None else (plan.recipe.model.device, plan.recipe.model.dtype)
    try:
        compute = Compute.resolve(device=device, dtype=dtype)
    except WmtpError as error:
        return Finding(mark="FAILED", name="device", text=str(error), hint=error.hint)
    return Finding(mark="ok", name="device", text=f"{compute.device}, {compute.dtype}")


def _of_plan(plan: Plan) -> Iterator[tuple[AnyComponent, Any]]:
    """Yield the components of a plan with their options, wrapped weightings included."""
    waiting: list[SelectedComponent | None] = [plan.data, plan.critic, plan.weighting, *plan.trackers]
    while waiting:
        if selected := waiting.pop(0):
            yield selected.component, selected.options
            waiting += selected.wrapped.values()


def _of_installed(loaded: list[LoadedPlugin]) -> Iterator[tuple[AnyComponent, Any]]:
    """Yield the components that have defaults for all options, each with its default options."""
    for plugin in loaded:
        for component in (each for by_name in plugin.components.values() for each in by_name.values()):
            if all(each.default is not attrs.NOTHING for each in attrs.fields(component.options)):
                yield component, component.options()
