"""Handles OS signals during the whole life of a process.

SIGINT, SIGTERM and SIGHUP end a command. During training, the first SIGINT, SIGTERM or SIGHUP requests a stop
after the current step, and the second stops training at once. While a run is opened or closed, signals are
delayed. SIGUSR1 requests a checkpoint; outside training the request is remembered. Under `nohup`, SIGHUP
remains ignored.

The exit codes of a command that a signal ends, 130 and 143, are defined in `exit_codes.py`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Self

from attrs import define, field

from weighted_mtp_core.errors import Terminated

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_Handler = Callable[[int, FrameType | None], None]
_checkpoint_requested = threading.Event()


def remember_checkpoint_requests() -> None:
    """Remember SIGUSR1 from now on; by default it would end the process."""
    signal.signal(signal.SIGUSR1, _remember)


@contextmanager
def raise_on_termination() -> Iterator[None]:
    """Within the block, make SIGTERM and SIGHUP raise `Terminated`, and remember SIGUSR1."""
    with _handling({signal.SIGTERM: _raise, signal.SIGHUP: _raise, signal.SIGUSR1: _remember}):
        yield


@contextmanager
def hold_signals() -> Iterator[None]:
    """Delay SIGINT, SIGTERM and SIGHUP until the end of the block; a second signal takes effect at once.

    Raises:
        KeyboardInterrupt: After SIGINT.
        Terminated: After SIGTERM or SIGHUP.
    """
    received: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if received:
            _raise(number, frame)
        received.append(number)

    with _handling(dict.fromkeys(_ENDING, hold)):
        yield
    if received:
        _raise(received[0], None)


@define(eq=False)
class StopRequest:
    """Handles the signals that arrive during a training loop, in a `with` block on the main thread."""

    _received: int | None = field(init=False, default=None)
    _handlers: ExitStack = field(init=False, factory=ExitStack)

    @property
    def requested(self) -> bool:
        """Whether a signal that ends the command has arrived."""
        return self._received is not None

    @property
    def checkpoint_requested(self) -> bool:
        """Whether SIGUSR1 has arrived since the last `forget_checkpoint_request`, even before the block."""
        return _checkpoint_requested.is_set()

    def forget_checkpoint_request(self) -> None:
        """Discard the request for a checkpoint and wait for the next SIGUSR1."""
        _checkpoint_requested.clear()

    def stop(self) -> None:
        """Raise the exception for the signal that requested the stop.

        Raises:
            KeyboardInterrupt: After SIGINT.
            Terminated: After SIGTERM or SIGHUP, or if another process of the run received the signal.
        """
        _raise(self._received or signal.SIGTERM, None)

    def __enter__(self) -> Self:
        handlers: dict[int, _Handler] = dict.fromkeys(_ENDING, self._on_stop)
        self._handlers.enter_context(_handling({**handlers, signal.SIGUSR1: _remember}))
        return self

    def __exit__(self, *error: object) -> None:
        self._handlers.close()

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            _raise(self._received, frame)
        self._received = number


@contextmanager
def _handling(handlers: Mapping[int, _Handler]) -> Iterator[None]:
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _raise(number: int, frame: FrameType | None) -> None:
    del frame
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _remember(number: int, frame: FrameType | None) -> None:
    del number, frame
    _checkpoint_requested.set()
