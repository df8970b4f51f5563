"""Open the recorder of a new run, or of a run to resume."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from weighted_mtp_core.api import RunInfo
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.redaction import redact_log_records
from weighted_mtp_core.runtime.interrupts import hold_signals
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.tracking.recorder import Recorder
from weighted_mtp_core.tracking.run_folder import RunFolder
from weighted_mtp_core.tracking.trackers import build_trackers


def open_recorder(plan: Plan, display: Display, *, resume: Path | None = None) -> Recorder:
    """Build the trackers of a plan, and begin a run in a new run folder or resume a run in its folder.

    Args:
        plan: The plan of the run.
        display: Shows the progress of the run to the user.
        resume: The folder of the run to resume; None for a new run.

    Raises:
        WmtpError: The run folder cannot be created or locked, or does not exist; or a tracker cannot be built
            or permanently refuses this run.
        RunFailedError: The journal is not writable.
    """
    redact_log_records()
    recipe = plan.recipe
    trackers = build_trackers(plan)
    with ExitStack() as held:  # signals are delayed until the recorder's block can close the run
        held.enter_context(hold_signals())
        if resume is None:
            folder = RunFolder.create(
                plan.runs_folder,
                experiment=plan.experiment,
                name=recipe.run.name,
                facts={"status": "RUNNING", **plan.identity},
                recipe_toml=plan.recipe_toml,
            )
        else:
            folder = RunFolder.open(resume)
        info = RunInfo(
            run_id=folder.run_id,
            name=recipe.run.name,
            experiment=plan.experiment,
            params=plan.params,
            tags=plan.tags,
            datasets=(),
            folder=folder.path,
        )
        recorder = Recorder.open(
            folder,
            info,
            trackers=trackers,
            recipe_toml=plan.recipe_toml,
            display=display,
            close_seconds=max((table.close_seconds for table in recipe.tracker), default=0.0),
        )
        recorder.start_backfill(plan.runs_folder / plan.experiment)
        recorder.hold_until_entered(held.pop_all())
    return recorder
