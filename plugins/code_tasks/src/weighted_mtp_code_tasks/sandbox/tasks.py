"""Judge programs as tasks of an executor, on this machine or on others."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, as_completed

import attrs
from weighted_mtp_core.api import RunFailedError, Verdict, VerdictKind, WmtpError

from weighted_mtp_code_tasks.sandbox.jobs import AnyJob
from weighted_mtp_code_tasks.sandbox.sandbox import Sandbox, refuse_errors
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings

_CHUNK = 200
"""Maximum number of programs of one task; judging so many takes longer than starting a sandbox."""

_STOPPED: set[str] = set()
"""Names of the calls of `judge_as_tasks` that have ended in this process; threads that work for them stop."""

_MAY_DIFFER = ("backend_detail", "kernel")
"""Keys of the provenance that may differ between machines; all their values are recorded with the labels."""

Judged = tuple[list[Verdict], Mapping[str, str]]
"""Verdicts, and the provenance of the verdicts."""


def judge_as_tasks(
    jobs: Sequence[AnyJob],
    settings: SandboxSettings,
    executor: Executor,
    *,
    on_done: Callable[[], None] | None = None,
) -> Judged:
    """Judge programs as tasks of an executor.

    Returns:
        Verdicts in the order of the jobs, and the provenance of all verdicts.

    Raises:
        WmtpError: No sandbox or no scratch folder can be used on a machine, or the sandboxes of two machines
            could give different verdicts.
        RunFailedError: A sandbox does not confine programs, too many programs could not be judged, machines
            were lost, or a task failed for another reason.
    """
    one_at_a_time = attrs.evolve(settings, workers=1)
    chunks = [jobs[start : start + _CHUNK] for start in range(0, len(jobs), _CHUNK)]
    name = secrets.token_hex(8)
    futures = [executor.submit(_judge, name, one_at_a_time, chunk) for chunk in chunks]
    try:
        for future in as_completed(futures):
            for _ in future.result()[0]:
                if on_done is not None:
                    on_done()
        judged = [future.result() for future in futures]
    except (WmtpError, KeyboardInterrupt):
        raise
    except CancelledError as error:
        raise RunFailedError("the connection to the scheduler was lost") from error
    except Exception as error:  # Dask raises an error if several workers were lost with a task
        raise RunFailedError(f"programs could not be judged: {error}") from error
    finally:
        _STOPPED.add(name)
        for future in futures:
            future.cancel()
    verdicts = [verdict for found, _ in judged for verdict in found]
    errors = [verdict.detail for verdict in verdicts if verdict.kind is VerdictKind.JUDGE_ERROR]
    refuse_errors(len(errors), len(verdicts), (errors or [""])[-1])
    return verdicts, _joined([provenance for _, provenance in judged])


def _judge(name: str, settings: SandboxSettings, jobs: Sequence[AnyJob]) -> Judged:
    def end_if_stopped() -> None:
        if name in _STOPPED:
            raise CancelledError

    with Sandbox(settings) as sandbox:
        return sandbox.judge(jobs, on_done=end_if_stopped), sandbox.provenance


def _joined(found: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    """Return one provenance from those of all tasks; raise WmtpError if the machines differ too much."""
    joined = {}
    for key in found[0] if found else ():
        values = sorted({each[key] for each in found})
        if len(values) > 1 and key not in _MAY_DIFFER:
            raise WmtpError(
                f"the machines have sandboxes that differ in `{key}`: {', '.join(values)}",
                hint="name one that all machines have in `data.options.sandbox.backend`",
            )
        joined[key] = ", ".join(values)
    return joined
