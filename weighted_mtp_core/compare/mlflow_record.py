"""Record a comparison as an MLflow run with the compared runs as its children. This module imports mlflow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from weighted_mtp_core import run_tags
from weighted_mtp_core.api import MetricPoint, RunInfo, RunOutcome
from weighted_mtp_core.builtin._mlflow_errors import NotDeliveredError
from weighted_mtp_core.builtin._mlflow_tracker import MlflowTracker
from weighted_mtp_core.builtin.mlflow import MlflowOptions
from weighted_mtp_core.compare.arms import Arm, digest
from weighted_mtp_core.compare.jobs import Job
from weighted_mtp_core.compare.table import EQUAL_TIME, Comparison
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.tracking.journal import now_ms
from weighted_mtp_core.tracking.run_history import read_history
from weighted_mtp_core.tracking.sync import amend_run
from weighted_mtp_core.tracking.trackers import build_trackers


def track(
    arms: Sequence[Arm],
    comparison: Comparison,
    *,
    runs: Mapping[Job, Path],
    files: Sequence[Path],
    folder: Path,
    log: Callable[[str], None],
) -> None:
    """Record a comparison as a run in each MLflow store of the first arm, as parent of the compared runs.

    Comparisons of the same arms and seeds are recorded in the same MLflow run. If the server is down, a
    warning is logged, and the comparison is recorded when `compare` is called again.

    Args:
        arms: The arms.
        comparison: The comparison.
        runs: The run folder of each finished job.
        files: Files with tables and plots.
        folder: The folder that contains the files; its name becomes the name of the MLflow run.
        log: Called with messages for the user.

    Raises:
        WmtpError: A tracker of the first arm cannot be built, or a compared run cannot be tagged, for example
            because it is in use.
    """
    plan = arms[0].plan
    for tracker, chosen in zip(build_trackers(plan).values(), plan.trackers, strict=True):
        if not isinstance(tracker, MlflowTracker) or not isinstance(chosen.options, MlflowOptions):
            continue
        info = describe_comparison(
            comparison.arms,
            comparison.seeds,
            run_id=digest(arms, comparison.seeds),
            experiments={arm.plan.experiment for arm in arms},
            prefix=chosen.options.experiment_prefix,
            params=set.intersection(*(set(arm.plan.params.items()) for arm in arms)),
            folder=folder,
        )
        if record_comparison(tracker, info, comparison, files=files, log=log):
            for run in runs.values():  # tags are written to the journals, so an outage only delays them
                if read_history(run).tags.get(run_tags.PARENT_RUN) != tracker.run_id:
                    amend_run(run, tags={run_tags.PARENT_RUN: tracker.run_id}, outcome=None, log=log)
            log(f"look at it: {tracker.where()}")


def describe_comparison(
    arms: Sequence[str],
    seeds: Sequence[int],
    *,
    run_id: str,
    experiments: set[str],
    prefix: str,
    params: Iterable[tuple[str, str]] = (),
    folder: Path,
) -> RunInfo:
    """Describe a comparison as an MLflow run.

    The comparison belongs to the experiment of the compared runs, or to `<prefix>/compare` if the compared
    runs are from several experiments.
    """
    names = " ".join(arms)
    own_params = {"compare.arms": names, "compare.seeds": " ".join(map(str, seeds))}
    return RunInfo(
        run_id=f"compare-{run_id}",
        name=folder.name,
        experiment=next(iter(experiments)) if len(experiments) == 1 else f"{prefix}/compare",
        params=dict(sorted({**own_params, **dict(params)}.items())),
        tags={run_tags.ALGO: "compare", run_tags.COMPARED_ARMS: names},
        datasets=(),
        folder=folder,
    )


def record_comparison(
    tracker: MlflowTracker,
    info: RunInfo,
    comparison: Comparison,
    *,
    files: Sequence[Path],
    log: Callable[[str], None],
) -> bool:
    """Record a comparison as an MLflow run; return whether this succeeded, and log a warning if not."""
    try:
        tracker.start(info)
        tracker.log_metrics(_points(comparison))
        for file in files:
            tracker.log_artifact(file, "compare")
        tracker.finish(RunOutcome.FAILED if comparison.missing else RunOutcome.FINISHED)
    except (WmtpError, NotDeliveredError) as error:
        log(f"WARNING: the comparison was not recorded in MLflow: {error}")
        return False
    return True


def _points(comparison: Comparison) -> list[MetricPoint]:
    """Return means, differences and p-values as points of MLflow metrics.

    The metrics are called `<metric>/<arm>`, `<metric>_difference/<arm>` and `<metric>_p/<arm>`; at equal wall
    clock, `_at_equal_time` is appended to `<metric>`. The step of a point is the number of compared runs, so
    a later call with more runs continues the curve.
    """
    values: dict[str, float] = {}
    for row in comparison.rows:
        metric = f"{row.metric}_at_equal_time" if row.at == EQUAL_TIME else row.metric
        values[f"{metric}/{row.arm}"] = row.estimate.mean
        if row.difference is not None:
            values[f"{metric}_difference/{row.arm}"] = row.difference.estimate.mean
            values[f"{metric}_p/{row.arm}"] = row.difference.p_value
    time_ms = now_ms()
    return [
        MetricPoint(name=name, value=value, step=comparison.count, time_ms=time_ms)
        for name, value in values.items()
        if math.isfinite(value)
    ]
