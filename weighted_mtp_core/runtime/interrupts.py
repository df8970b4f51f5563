"""OS signals during training: the first one requests a stop after the step, the second one stops at once.

The exit codes that follow, 130 and 143, are in `exit_codes.py`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from attrs import define, field

from weighted_mtp_core.errors import Terminated

_ASK = (signal.SIGINT, signal.SIGTERM)


@define(eq=False)
class StopRequest:
    """Listens to SIGINT, SIGTERM and SIGUSR1 within a `with` block, on the main thread.

    Attributes:
        checkpoint_now: Whether SIGUSR1 asked for a checkpoint; the loop sets it back.
    """

    checkpoint_now: bool = field(init=False, default=False)
    _asked: int | None = field(init=False, default=None)
    _before: dict[int, Any] = field(init=False, factory=dict)

    @property
    def requested(self) -> bool:
        """Whether somebody asked for the end."""
        return self._asked is not None

    def stop(self) -> None:
        """End as the signal would have ended the process.

        Raises:
            KeyboardInterrupt: After SIGINT.
            Terminated: After SIGTERM.
        """
        raise KeyboardInterrupt if self._asked == signal.SIGINT else Terminated

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in _ASK}
            self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._checkpoint)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._asked is not None:
            self.stop()
        self._asked = number

    def _checkpoint(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.checkpoint_now = True


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` within the block, on the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
