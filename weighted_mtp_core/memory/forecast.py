"""Forecasts the memory that a run takes: the largest use of the device and of main memory."""

from __future__ import annotations

import re

from attrs import evolve, frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.memory.documents import Documents
from weighted_mtp_core.memory.parts import (
    COPIES,
    CRITIC,
    OPTIMISER,
    PARAMETERS,
    TRAINING,
    VALIDATION,
    Phase,
    Phases,
    Target,
)
from weighted_mtp_core.memory.phases import find_phases
from weighted_mtp_core.plan import Plan

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 1 << 20, "GIB": 1 << 30}


@frozen(kw_only=True)
class Forecast:
    """A forecast of the largest use of memory in each phase of a run.

    Attributes:
        target: The device and the processes of the run.
        parameters: Number of parameters of the policy.
        rows: Number of rows, and of tokens per row, of the largest micro-batch of stage 2; both are 0 if
            stage 2 was not simulated.
        device: The use of the device by one process, by phase; on a CPU, the device is main memory.
        host: The use of main memory by all processes of a machine, by phase, if the device is not a CPU;
            empty on a CPU.
        uncounted: What the forecast leaves out, with the reasons.
    """

    target: Target
    parameters: int
    rows: tuple[int, int]
    device: tuple[Phase, ...]
    host: tuple[Phase, ...]
    uncounted: tuple[str, ...]

    @property
    def peak(self) -> int:
        """The largest use of the device's memory by one process, in bytes."""
        return max((phase.total for phase in self.device), default=0)

    @property
    def host_peak(self) -> int:
        """The largest use of main memory by all processes of a machine, in bytes."""
        if self.target.device == "cpu":
            return self.target.local * self.peak
        return max((phase.total for phase in self.host), default=0)


def forecast(plan: Plan, documents: Documents, target: Target, *, only: str | None = None) -> Forecast:
    """Forecast how much memory a run of this plan takes.

    Args:
        plan: The plan.
        documents: The documents of the data, from which the largest batches are made.
        target: The device and the processes of the run.
        only: Name of the only phase to simulate on the device; None stands for all phases.

    Raises:
        WmtpError: The config of the base model cannot be read, the model is not supported as a policy, or a
            package is missing.
    """
    found = find_phases(plan, documents, target, only=only)
    table = plan.recipe.checkpoint
    steps = plan.recipe.train.given_steps or table.every + 1
    sharded = found.held < found.model
    state = min(found.saved, found.held) + found.optimiser
    copies = state if 0 < table.every < steps else 0
    # Sharded parameters are written tensor by tensor. Otherwise the whole file is made in memory and copied
    # once.
    best = 0 if sharded else 2 * found.saved
    host: tuple[Phase, ...] = ()
    if target.device == "cpu":
        device = _with_copies(found, copies, best)
    else:
        device = found.found
        files = target.local * copies + (0 if sharded else best + found.saved)
        host = (
            Phase(name="loading", parts={PARAMETERS: target.local * found.held}),
            Phase(name="files", parts={COPIES: files}),
        )
    return Forecast(
        target=target,
        parameters=found.parameters,
        rows=found.rows,
        device=device,
        host=host,
        uncounted=found.uncounted,
    )


def _with_copies(found: Phases, copies: int, best: int) -> tuple[Phase, ...]:
    """Return the phases of a run on a CPU, with the copies in main memory from which files are written."""
    held = {TRAINING: copies, VALIDATION: copies}
    phases = [
        evolve(phase, parts={**phase.parts, COPIES: held[phase.name]}) if held.get(phase.name) else phase
        for phase in found.found
    ]
    files = {PARAMETERS: found.held, OPTIMISER: found.optimiser, CRITIC: found.critic, COPIES: copies + best}
    return (*phases, Phase(name="files", parts={part: size for part, size in files.items() if size}))


def parse_size(text: str) -> int:
    """Return a size such as `80GB` (10^9 bytes) or `24GiB` (2^30 bytes) in bytes.

    Raises:
        WmtpError: The text is not a size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise WmtpError(f"cannot read the size `{text}`", hint="write, for example, 80GB or 24GiB")
    return round(float(match[1]) * unit)


def size(count: float) -> str:
    """Return a number of bytes with a unit, such as `1.2 GB`."""
    if count >= 10**9:
        return f"{count / 10**9:.1f} GB"
    return f"{count / 10**6:.0f} MB" if count >= 10**7 else f"{count / 10**6:.1f} MB"
