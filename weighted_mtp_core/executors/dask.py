"""An executor that runs tasks on the workers of a Dask scheduler; it needs the extra `dask` of core."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.executors.same_code import SameCode, run_checked
from weighted_mtp_core.redaction import secrets

ArgumentsT = ParamSpec("ArgumentsT")
ResultT = TypeVar("ResultT")
_CONNECT_S = 20


class DaskExecutor(Executor):
    """Submits calls of functions in installed modules to the workers of a Dask scheduler.

    If a worker is lost, Dask repeats its tasks on other workers, each task at most
    `distributed.scheduler.allowed-failures` times (3 by default).

    Args:
        address: `HOST:PORT` of the scheduler.
        code: The code that each worker must run.

    Raises:
        WmtpError: The package `distributed` is not installed.
        RunFailedError: No scheduler answers at the address.
    """

    def __init__(self, address: str, code: SameCode) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise WmtpError(
                f"`--executor dask://{address}` needs the package `distributed`",
                hint="pip install 'weighted-mtp-core[dask]'",
            ) from error
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # because the caller reports errors
        try:
            self._client = Client(address, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise RunFailedError(
                f"no Dask scheduler answers at `{address}`: {error}",
                hint="start one: dask scheduler --port PORT",
            ) from error
        self._executor = self._client.get_executor(pure=False)
        self._code = code

    def submit(
        self,
        fn: Callable[ArgumentsT, ResultT],
        /,
        *args: ArgumentsT.args,
        **kwargs: ArgumentsT.kwargs,
    ) -> Future[ResultT]:
        """Submit a call; if the worker runs other code than the client, the future raises `WmtpError`.

        Raises:
            WmtpError: An argument contains a secret of the environment, which a scheduler must not receive.
        """
        assert not kwargs  # `concurrent.futures` allows keyword arguments, but no caller uses them
        found = secrets()
        sent = pickle.dumps(args) if found else b""
        if any(secret.encode() in sent for secret in found):
            raise WmtpError(
                "a task for other machines contains a secret of the environment",
                hint="set the secret in the environment of the workers instead",
            )
        future: Future[ResultT] = self._executor.submit(run_checked, self._code, fn, args)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002
        """Disconnect from the scheduler, which then cancels every task that has not ended."""
        self._executor.shutdown(wait=False)
        self._client.close()
