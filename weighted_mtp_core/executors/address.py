"""Open the executor (`concurrent.futures.Executor`) that the option `--executor` selects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.executors.same_code import SameCode
from weighted_mtp_core.plan import Plan

_DASK = "dask://"


def local_slots(address: str) -> int | None:
    """Return N for an address `local:N`, or None for an address `dask://HOST:PORT`.

    Raises:
        WmtpError: The address has neither the form `local:N` nor the form `dask://HOST:PORT`.
    """
    if local := re.fullmatch(r"local:([1-9][0-9]*)", address):
        return int(local[1])
    if re.fullmatch(r"dask://[^\s/@]+:[0-9]+", address):
        return None
    raise WmtpError(f"`--executor {address}`: expected `local:N` with N of 1 or more, or `dask://HOST:PORT`")


@contextmanager
def open_executor(
    address: str, plans: Sequence[Plan], *, in_each_thread: Callable[[], None] | None = None
) -> Iterator[Executor]:
    """Open an executor; at the end of the `with` block, tasks that have not started are cancelled.

    A Dask scheduler then also cancels tasks that have started.

    Args:
        address: `local:N` for a pool of N threads in this process, or `dask://HOST:PORT` for the workers of a
            Dask scheduler. The tasks of a thread pool start processes of their own.
        plans: The plans of the recipes that the tasks execute. A Dask worker refuses a task if the worker
            does not run the code on which the plans depend.
        in_each_thread: Called at the start of each thread of `local:N`; Dask workers do not call it.

    Raises:
        WmtpError: The address is malformed, or the package `distributed` is not installed.
        RunFailedError: No Dask scheduler answers at the address.
    """
    slots = local_slots(address)
    if slots is None:
        from weighted_mtp_core.executors.dask import DaskExecutor

        executor: Executor = DaskExecutor(address.removeprefix(_DASK), SameCode.of(plans))
    else:
        executor = ThreadPoolExecutor(slots, initializer=in_each_thread)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
