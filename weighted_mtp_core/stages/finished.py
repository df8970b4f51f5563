"""A run that is over, taken up again: its recipe, its data and its best policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.plan import Plan, make_plan
from weighted_mtp_core.stages.checkpoint import load_model
from weighted_mtp_core.stages.prepare import Prepared, prepare
from weighted_mtp_core.tracking.run_folder import RunFolder, read_run


def plan_of(run: Path, *, overrides: Sequence[str] = ()) -> Plan:
    """Return the plan of a run folder's resolved recipe.

    Args:
        run: The run folder.
        overrides: `key=value` changes, checked like those of `--set`.

    Raises:
        WmtpError: The run left no checkpoint, or an override is wrong.
    """
    checkpoint = _checkpoint(run)
    if not checkpoint.is_file():
        raise WmtpError(
            f"the run `{run}` has no `{checkpoint.relative_to(run)}`",
            hint="its stage 2 never validated, or the file lies with a tracker only: put it there again",
        )
    return make_plan(RunFolder(path=run).recipe, overrides=overrides)


def prepare_finished(run: Path, plan: Plan, *, say: Callable[[str], None]) -> Prepared:
    """Make a run's data ready, and its policy as its best checkpoint holds it.

    Raises:
        WmtpError: The data are not those of the run, or the checkpoint is damaged.
    """
    prepared = prepare(plan, say=say)
    was, now = read_run(run).get("data.sha256"), prepared.source.version().sha256
    if was is not None and was != now:
        raise WmtpError(
            f"the data of the run `{run}` had the SHA-256 {was[:12]}..., now they have {now[:12]}...",
            hint="restore the data that it was trained on, so that nothing it has seen is taken for unseen",
        )
    load_model(prepared.policy, _checkpoint(run))
    return prepared


def _checkpoint(run: Path) -> Path:
    return RunFolder(path=run).checkpoints / "best_model.pt"
