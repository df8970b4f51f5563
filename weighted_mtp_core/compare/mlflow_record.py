"""A comparison as a run of its own at MLflow, with the runs that it compares as its children."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weighted_mtp_core.api import MetricPoint, RunInfo, RunOutcome
from weighted_mtp_core.builtin.mlflow import MlflowOptions
from weighted_mtp_core.compare.arms import Arm
from weighted_mtp_core.compare.runner import Job
from weighted_mtp_core.compare.table import EQUAL_TIME, Comparison
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.tracking.journal import Entry, now_ms, read_journal
from weighted_mtp_core.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from weighted_mtp_core.builtin._mlflow_tracker import MlflowTracker

EXPERIMENT = "compare"
"""Comparisons of runs in several experiments lie in `<experiment_prefix>/compare`, others beside them."""
PARENT_TAG = "mlflow.parentRunId"


def track(
    arms: Sequence[Arm],
    comparison: Comparison,
    *,
    runs: Mapping[Job, Path],
    files: Sequence[Path],
    folder: Path,
    log: Callable[[str], None],
) -> None:
    """Log a comparison to the first arm's MLflow, and make the runs its children.

    The same arms and seeds are the same run there. A server that is away is said to be; the comparison is in
    its files all the same, and the next call logs it.

    Args:
        arms: What was compared.
        comparison: What came out.
        runs: The run folders.
        files: Tables and plots.
        folder: Where they lie.
        log: Tells the person.
    """
    from weighted_mtp_core.builtin._mlflow_tracker import MlflowTracker
    from weighted_mtp_core.tracking.trackers import build_trackers

    plan = arms[0].plan
    for tracker, chosen in zip(build_trackers(plan).values(), plan.trackers, strict=True):
        if not isinstance(tracker, MlflowTracker) or not isinstance(chosen.options, MlflowOptions):
            continue
        info = _describe(arms, comparison, prefix=chosen.options.experiment_prefix, folder=folder)
        if record_comparison(tracker, info, comparison, files=files, log=log):
            _adopt(list(runs.values()), tracker.run_id, log=log)
            log(f"look at it: {tracker.where()}")


def record_comparison(
    tracker: MlflowTracker,
    info: RunInfo,
    comparison: Comparison,
    *,
    files: Sequence[Path],
    log: Callable[[str], None],
) -> bool:
    """Log a comparison as a run; return whether the store took it."""
    from weighted_mtp_core.builtin._mlflow_errors import NotDeliveredError

    try:
        tracker.start(info)
        tracker.log_metrics(_points(comparison))
        for file in files:
            tracker.log_artifact(file, "compare")
        tracker.finish(RunOutcome.FAILED if comparison.missing else RunOutcome.FINISHED)
    except (WmtpError, NotDeliveredError) as error:
        log(f"WARNING: MLflow did not get the comparison: {error}")
        return False
    return True


def digest(arms: Sequence[Arm], seeds: Sequence[int]) -> str:
    """Return 8 characters that are the same for the same arms and seeds."""
    identities = [arm.identity(seed) for arm in arms for seed in seeds]
    return hashlib.sha256(json.dumps(identities, sort_keys=True).encode()).hexdigest()[:8]


def _describe(arms: Sequence[Arm], comparison: Comparison, *, prefix: str, folder: Path) -> RunInfo:
    names = " ".join(comparison.arms)
    shared = set.intersection(*(set(arm.plan.params.items()) for arm in arms))
    experiments = {arm.plan.experiment for arm in arms}
    params = {"compare.arms": names, "compare.seeds": " ".join(map(str, comparison.seeds)), **dict(shared)}
    return RunInfo(
        run_id=f"compare-{digest(arms, comparison.seeds)}",
        name=folder.name,
        experiment=experiments.pop() if len(experiments) == 1 else f"{prefix}/{EXPERIMENT}",
        params=dict(sorted(params.items())),
        tags={"algo": EXPERIMENT, "wmtp.compare": names},
        datasets=(),
        folder=folder,
    )


def _points(comparison: Comparison) -> list[MetricPoint]:
    """Return means, differences and p-values as `<metric>/<arm>` and the like.

    The step is the number of runs: a comparison that is called again with more of them adds to the curve.
    """
    time_ms = now_ms()
    step = comparison.count
    points = []
    for row in comparison.rows:
        metric = f"{row.metric}_at_equal_time" if row.at == EQUAL_TIME else row.metric
        values = {f"{metric}/{row.arm}": row.estimate.mean}
        if row.difference is not None:
            values[f"{metric}_difference/{row.arm}"] = row.difference.estimate.mean
            values[f"{metric}_p/{row.arm}"] = row.difference.p_value
        points += [
            MetricPoint(name=name, value=value, step=step, time_ms=time_ms) for name, value in values.items()
        ]
    return points


def _adopt(runs: Sequence[Path], parent: str, *, log: Callable[[str], None]) -> None:
    """Tag runs as children; through their journals, so that an outage delays that and loses nothing."""
    from weighted_mtp_core.tracking.sync import amend_run

    for run in runs:
        tags: dict[str, str] = {}
        for entry in read_journal(RunFolder(path=run).journal, kinds=("tags",)):
            if isinstance(entry, Entry):
                tags |= entry.fields["tags"]
        if tags.get(PARENT_TAG) != parent:
            amend_run(run, tags={PARENT_TAG: parent}, outcome=None, log=log)
