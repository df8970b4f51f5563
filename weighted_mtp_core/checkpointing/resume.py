"""Finds the run that `--resume` continues, and checks that recipe, code and data are still the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from weighted_mtp_core.api import DatasetVersion
from weighted_mtp_core.checkpointing.manager import steps_of_snapshots
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import python_command
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.recipe.schema import default_selection
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed
from weighted_mtp_core.tracking.journal import read_journal
from weighted_mtp_core.tracking.run_folder import RunFolder, find_run, is_held, read_run
from weighted_mtp_core.tracking.run_history import RunHistory

SAFE = (
    "checkpoint",
    "critic.train.max_bad_steps",
    "critic.train.steps",
    "evaluate",
    "model.activation_checkpointing",
    "run.resume",
    "run.tags",
    "tracker",
    "train.max_bad_steps",
    "train.steps",
)
"""Keys besides `Plan.same_result` that may differ in a resumed run, as they do not affect completed steps."""


def run_to_resume(plan: Plan, named: str | None) -> Path | None:
    """Return the folder of the run to continue; None means a new run.

    Args:
        plan: The plan.
        named: A run's folder or id (`--resume`); if None, the recipe's `run.resume` decides.

    Raises:
        WmtpError: There is no such run.
    """
    runs = plan.runs_folder
    if named is not None:
        return find_run(runs, named)
    if plan.recipe.run.resume == "never":
        return None
    folder = runs / plan.experiment / plan.recipe.run.name
    found = sorted(file.parent for file in folder.glob("[!.]*/run.json"))
    return next((path.absolute() for path in reversed(found) if _unfinished(path, plan)), None)


def _unfinished(path: Path, plan: Plan) -> bool:
    facts = read_run(path)
    if facts.get("status") == "FINISHED" or "params" not in facts or is_held(path):
        return False
    return not _changes(facts, plan, allowed=())


def _changes(was: Mapping[str, Any], plan: Plan, *, allowed: Sequence[str]) -> list[str]:
    """Return the differences in recipe and source code between a run's `run.json` and a plan."""
    safe = (*SAFE, *plan.same_result, *allowed)
    before, now = was.get("distributions", {}), plan.distributions
    return _differences(was.get("params", {}), plan.params, allowed=safe) + _differences(
        {f"distributions.{name}": source for name, source in before.items()},
        {f"distributions.{name}": source for name, source in now.items()},
        allowed=allowed,
    )


def refuse_changes(path: Path, plan: Plan, *, allowed: Sequence[str]) -> None:
    """Compare a run's recipe and the source of its code with the plan that continues it.

    Args:
        path: The run's folder.
        plan: The plan.
        allowed: Keys that the user allows to differ (`--allow-change`).

    Raises:
        WmtpError: There are differences that are not allowed, the run is already finished, or the run's best
            state so far was selected by another measure.
    """
    was = read_run(path)
    _refuse(path, _changes(was, plan, allowed=allowed))
    before, now = was.get("params", {}), plan.params
    done = _steps_done(path)
    trains_on = int(now["train.steps"]) > int(before.get("train.steps", 0))
    measured = done.get("evaluate") == int(now["train.steps"])
    if measured and any(before.get(key) != now[key] for key in now if key.startswith("evaluate.")):
        raise WmtpError(
            f"the run `{path}` was evaluated with other settings of `[evaluate]`",
            hint="measure it again: "
            + python_command("weighted_mtp_core", "evaluate", str(path))
            + " --help",
        )
    if was.get("status") == "FINISHED" and not trains_on:
        raise WmtpError(f"the run `{path}` is finished", hint="raise `train.steps` to train it further")
    _refuse_fewer_steps(path, plan, done)
    chose, chooses = _selects_by(before), _selects_by(now)
    if "policy" in done and chose != chooses:  # scores of different measures cannot be compared
        raise WmtpError(
            f"the run `{path}` chooses the state to keep by `{chose}`; `train.select_by` is now `{chooses}`",
            hint="undo the change, or begin a new run",
        )


def _selects_by(params: Mapping[str, str]) -> str:
    default = default_selection(params.get("model.train"), params.get("loss.heads"))
    return params.get("train.select_by") or default


def _refuse_fewer_steps(path: Path, plan: Plan, done: Mapping[str, int]) -> None:
    table = plan.recipe.critic
    planned = {"policy": plan.recipe.train.steps} | ({} if table is None else {"critic": table.train.steps})
    for stage, steps in planned.items():
        key = "train.steps" if stage == "policy" else "critic.train.steps"
        if steps < done.get(stage, 0):
            raise WmtpError(
                f"the run `{path}` has done {done[stage]} steps of stage `{stage}`; `{key}` is {steps}",
                hint=f"set `{key}` to {done[stage]} or more, or begin a new run",
            )
    before = read_run(path).get("params", {}).get("critic.train.steps")
    if "policy" in done and table is not None and before not in {None, str(table.train.steps)}:
        raise WmtpError(
            f"the run `{path}` has ended stage `critic` after {before} steps; `critic.train.steps` is "
            f"{table.train.steps}",
            hint="undo the change, or begin a new run",
        )


def _steps_done(path: Path) -> dict[str, int]:
    """Return the last step of each stage that has begun, according to journal and checkpoints."""
    folder = RunFolder(path=path)
    history = RunHistory()
    for line in read_journal(folder.journal, kinds=("metrics",)) if folder.journal.is_file() else ():
        history.add(line)
    done = {
        stage: max(points[-1].step for points in metrics.values())
        for stage, metrics in history.metrics.items()
    }
    planned = read_run(path).get("params", {}).get("critic.train.steps")
    if "critic" in done and planned is not None:
        done["critic"] = min(done["critic"], int(planned))  # its judgement is recorded one step later
    for stage, step in steps_of_snapshots(folder.checkpoints):
        done[stage] = max(step, done.get(stage, 0))
    return done


def refuse_other_data(folder: RunFolder, version: DatasetVersion, *, allowed: Sequence[str]) -> bool:
    """Compare the data with the data that the run started with; a new run records its data instead.

    Returns:
        Whether the data are new to the run.

    Raises:
        WmtpError: The data differ.
    """
    key = "data.sha256"
    was = read_run(folder.path).get(key)
    if was is not None:
        _refuse(folder.path, _differences({key: was}, {key: version.sha256}, allowed=allowed))
    folder.record(**{key: version.sha256})
    return was != version.sha256


def fingerprint(distributed: Distributed = SINGLE_PROCESS) -> dict[str, str]:
    """Return the properties of the machine and the processes that affect the exact result of training."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "processes": str(distributed.size),
    }


def other_machine(path: Path, distributed: Distributed) -> str | None:
    """Return a warning if the machine or the number of processes differs from the run so far, or None."""
    was, now = read_run(path).get("fingerprint", {}), fingerprint(distributed)
    differing = [f"{key} {was[key]} -> {now[key]}" for key in now if key in was and was[key] != now[key]]
    if not differing:
        return None
    return (
        f"WARNING: this machine differs from the one that the run started on ({', '.join(differing)}): from "
        "here on, results are equal up to rounding (about 1e-4 after some hundred steps), not bit for bit"
    )


def _differences(was: Mapping[str, str], now: Mapping[str, str], *, allowed: Sequence[str]) -> list[str]:
    def is_allowed(key: str) -> bool:
        return any(key == each or key.startswith(f"{each}.") for each in allowed)

    return [
        f"{key}: {was.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and not is_allowed(key)
    ]


def _refuse(path: Path, faults: Sequence[str]) -> None:
    if faults:
        key = faults[0].partition(":")[0]
        raise WmtpError(
            f"the run `{path}` cannot continue with these changes:\n  " + "\n  ".join(faults),
            hint=f"undo the change, start a new run, or accept it: --allow-change {key}",
        )
