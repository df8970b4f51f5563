"""The checks of the command `doctor` for data sources that run programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from weighted_mtp_core.api import Finding

from weighted_mtp_code_tasks.sandbox.backends import available_backends
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings


class _RunsPrograms(Protocol):
    @property
    def sandbox(self) -> SandboxSettings: ...


def examine_sandbox(options: _RunsPrograms, storage: Path) -> Iterator[Finding]:  # noqa: ARG001 - see `Component`
    """Report which of the sandboxes that the options allow work on this machine."""
    wanted = options.sandbox.backend
    if wanted == "trusted":
        yield Finding(mark="warning", name="sandbox", text="none: programs run without a sandbox")
        return
    states = [state for state in available_backends() if wanted in {"auto", state.name}]
    able = [state.name for state in states if state.available]
    if able:
        yield Finding(mark="ok", name="sandbox", text=", ".join(able))
    else:
        why = "; ".join(f"{state.name}: {state.detail}" for state in states)
        yield Finding(mark="FAILED", name="sandbox", text=f"no back end works ({why})")
