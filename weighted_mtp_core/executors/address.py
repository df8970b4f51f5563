"""Open the `concurrent.futures` executor that `--executor` names."""

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
    """Return N of `local:N`, or None for `dask://HOST:PORT`.

    Raises:
        WmtpError: The address has neither form.
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
    """Open the executor that `address` names; tasks that wait at the end of the block are cancelled.

    Args:
        address: `local:N`, a pool of N threads of this process whose tasks start processes; or
            `dask://HOST:PORT`, the workers of a Dask scheduler.
        plans: The plans of the recipes that the tasks execute. A Dask worker refuses a task unless the worker
            runs the same code.
        in_each_thread: Called at the start of each thread of `local:N`.

    Raises:
        WmtpError: The package `distributed` is not installed.
        RunFailedError: No scheduler answers at the address.
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
