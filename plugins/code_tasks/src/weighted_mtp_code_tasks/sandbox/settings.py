"""Where untrusted programs run, and what one program may use."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen
from attrs import validators as v


@frozen(kw_only=True)
class SandboxSettings:
    """`[data.options.sandbox]`: where untrusted programs run, and what one program may use.

    `backend = "auto"` takes the first of bubblewrap and landlock that works and refuses where neither does;
    `"trusted"` runs programs without a sandbox, for data whose every program you trust.
    """

    backend: Literal["auto", "bubblewrap", "landlock", "trusted"] = "auto"
    cpu_seconds: float = field(default=5.0, validator=v.gt(0))
    wall_seconds: float = field(default=30.0, validator=v.gt(0))
    memory_mb: int = field(default=512, validator=v.ge(64))
    workers: int = field(default=0, validator=v.ge(0))  # 0: one a core
