"""Check that a worker on another machine runs the same code as the client, without importing a plugin."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from attrs import frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.plugins.discovery import find
from weighted_mtp_core.plugins.source_identity import source_identity

ResultT = TypeVar("ResultT")


@frozen(kw_only=True)
class SameCode:
    """The code that a client expects on its workers.

    Attributes:
        plugins: Names of the plugins that the worker needs.
        distributions: Version and source of each distribution, as pairs (name, identity). An identity has
            the form that `source_identity` returns.
    """

    plugins: tuple[str, ...]
    distributions: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, plans: Sequence[Plan]) -> SameCode:
        """Return the code that the results of the plans depend on."""
        components = (each for plan in plans for each in (plan.weighting, plan.data, plan.critic) if each)
        names = {plugin.name for component in components for plugin in component.plugins}
        identities = {pair for plan in plans for pair in plan.distributions.items()}
        return cls(plugins=tuple(sorted(names)), distributions=tuple(sorted(identities)))


def run_checked(code: SameCode, function: Callable[..., ResultT], arguments: Sequence[Any]) -> ResultT:
    """Check the code of this worker, then call a function and return its result.

    Raises:
        WmtpError: A plugin is missing on the worker, or a distribution has another version or source code
            there; the message lists all differences.
    """
    if differing := _differences(code):
        raise WmtpError(
            f"the worker at {place()} does not run the code of the client: {'; '.join(differing)}",
            hint="install the same versions and sources there as at the client, and restart the worker",
        )
    return function(*arguments)


@cache  # a worker does not import a module again, even if its file changes
def _differences(code: SameCode) -> tuple[str, ...]:
    installed = find()
    missing = [name for name in code.plugins if name not in installed]
    here = source_identity(installed[name] for name in code.plugins if name in installed)
    return (
        *(f"plugin `{name}` is missing there" for name in missing),
        *(
            f"{name} {_short(wanted)} at the client, {_short(here.get(name, 'missing'))} there"
            for name, wanted in code.distributions
            if here.get(name) != wanted
        ),
    )


def place() -> str:
    """Return the host and the working folder of this process, for messages."""
    return f"`{socket.gethostname()}` in `{Path.cwd()}`"


def _short(identity: str) -> str:
    """Return an identity `<version>, source <SHA-256>` with a shortened SHA-256."""
    version, _, sha256 = identity.partition(", source ")
    return f"{version} (source {sha256[:12]})" if sha256 else version
