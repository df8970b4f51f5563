"""The table of options `sandbox` of data sources that run programs."""

from __future__ import annotations

import os
from typing import Literal

from attrs import field, frozen
from attrs import validators as v
from weighted_mtp_core.api import SAME_RESULT


@frozen(kw_only=True)
class SandboxSettings:
    """`[data.options.sandbox]`: how untrusted programs are confined, and which resources one program may use.

    The limits apply to each run of a program; a program that reads stdin is run once for each test case.

    Attributes:
        backend: Method of confinement. `auto` uses bubblewrap if it works, otherwise Landlock; if neither
            works, judging is refused. `trusted` runs programs without a sandbox and is meant for data that
            contain only trusted programs.
        cpu_seconds: Maximum CPU time of a program, in seconds.
        wall_seconds: Maximum elapsed time of a program, in seconds; this limit also ends programs that sleep.
        memory_mb: Maximum address space of a program, in MiB.
        workers: Number of programs that run at the same time. With 0, the number is OMP_NUM_THREADS if that
            variable is a positive number, otherwise the number of cores. `data prepare --executor` ignores
            this option, because each of its tasks runs one program at a time.
    """

    backend: Literal["auto", "bubblewrap", "landlock", "trusted"] = "auto"
    cpu_seconds: float = field(default=5.0, validator=v.gt(0))
    wall_seconds: float = field(default=30.0, validator=v.gt(0))
    memory_mb: int = field(default=512, validator=v.ge(64))
    workers: int = field(default=0, validator=v.ge(0), metadata=SAME_RESULT)

    def limits(self) -> dict[str, float]:
        """Return, by name, those limits that can change verdicts and are not equal to their defaults."""
        names = ("cpu_seconds", "wall_seconds", "memory_mb")
        default = SandboxSettings()
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(default, name)}

    def worker_count(self) -> int:
        """Return how many programs run at the same time on this machine.

        OMP_NUM_THREADS is used because it limits a process that shares the machine with others, such as a run
        of the command `compare`.
        """
        given = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(given) if given.isdecimal() else 0
        return self.workers or threads or len(os.sched_getaffinity(0))
