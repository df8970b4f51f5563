"""OS signals during training: the first one requests a stop after the step, the second one stops at once.

The exit codes that follow, 130 and 143, are in `exit_codes.py`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from attrs import define, field

from weighted_mtp_core.errors import Terminated


@define(eq=False)
class StopRequest:
    """Handles SIGINT, SIGTERM and SIGUSR1 within a `with` block on the main thread.

    Attributes:
        checkpoint_now: SIGUSR1 requested a checkpoint; the loop resets it.
    """

    checkpoint_now: bool = field(init=False, default=False)
    _received: int | None = field(init=False, default=None)
    _handlers_before: dict[int, Any] = field(init=False, factory=dict)

    @property
    def requested(self) -> bool:
        """Whether SIGINT or SIGTERM arrived."""
        return self._received is not None

    def stop(self) -> None:
        """End as the signal would have ended the process.

        Raises:
            KeyboardInterrupt: After SIGINT.
            Terminated: After SIGTERM.
        """
        raise KeyboardInterrupt if self._received == signal.SIGINT else Terminated

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handlers = {
                signal.SIGINT: self._on_stop,
                signal.SIGTERM: self._on_stop,
                signal.SIGUSR1: self._on_checkpoint,
            }
            self._handlers_before = {number: signal.signal(number, each) for number, each in handlers.items()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._received is not None:
            self.stop()
        self._received = number

    def _on_checkpoint(self, number: int, frame: FrameType | None) -> None:
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
