"""Finds the run to resume, and refuses changes of recipe, code and data that are not allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch

from weighted_mtp_core.api import DatasetVersion
from weighted_mtp_core.checkpointing.manager import steps_of_snapshots
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import python_command
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.recipe.train_table import TrainTable, default_selection
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed
from weighted_mtp_core.tracking.journal import read_journal
from weighted_mtp_core.tracking.run_folder import CHANGED, RunFolder, find_run, is_held, read_run
from weighted_mtp_core.tracking.run_history import RunHistory

_NO_EFFECT = (
    "checkpoint",
    "critic.train.max_bad_steps",
    "evaluate",
    "model.activation_checkpointing",
    "run.over_memory",
    "run.resume",
    "run.tags",
    "tracker",
    "train.max_bad_steps",
)
"""Recipe keys, besides those in `Plan.same_result`, on which the trained policy does not depend."""

SAFE = (
    *_NO_EFFECT,
    "critic.train.epochs",
    "critic.train.steps",
    "train.epochs",
    "train.patience",
    "train.steps",
)
"""Recipe keys, besides those in `Plan.same_result`, that may differ in a run that `--resume` continues."""

LAST_STEP = {"critic": "critic.last_step", "policy": "policy.last_step"}
STEPS = {"critic": "critic.steps", "policy": "policy.steps"}
"""Keys in `run.json` for a stage that has ended: LAST_STEP for its last step, STEPS for its planned steps."""


def run_to_resume(plan: Plan, named: str | None) -> Path | None:
    """Return the folder of the run to continue, or None if a new run is to begin.

    Args:
        plan: The plan of the recipe.
        named: Folder or id of a run, from `--resume`; if None, the recipe's `run.resume` decides. Its value
            `auto` selects, among the runs of the same experiment and name, the latest one that is unfinished,
            not running, and without changes that affect the trained policy, see `changed_keys`.

    Raises:
        WmtpError: `named` matches no run or several runs, or a run is on a file system without locks.
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
    return not changed_keys(facts, plan)


def changed_keys(was: Mapping[str, Any], plan: Plan) -> list[str]:
    """Return the keys that affect the trained policy and that have changed since the run began.

    These are recipe keys, `distributions.<name>` for source code, and `data.sha256`.

    Args:
        was: The `run.json` of the run, which contains the changes of earlier resumes.
        plan: The plan that continues the run.
    """
    now = _changes(was, plan, safe=_NO_EFFECT, allowed=())
    return sorted({*was.get(CHANGED, ()), *(change.partition(":")[0] for change in now)})


def _changes(was: Mapping[str, Any], plan: Plan, *, safe: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """Return the differences in recipe and source code between the `run.json` of a run and a plan.

    Differences of keys in `allowed`, of recipe keys in `safe` and of keys in `plan.same_result` are left out.
    """
    safe = (*safe, *plan.same_result, *allowed)
    before, now = was.get("distributions", {}), plan.distributions
    return _differences(was.get("params", {}), plan.params, allowed=safe) + _differences(
        {f"distributions.{name}": source for name, source in before.items()},
        {f"distributions.{name}": source for name, source in now.items()},
        allowed=allowed,
    )


def refuse_changes(path: Path, plan: Plan, *, allowed: Sequence[str]) -> None:
    """Compare the recipe and the source code of a run with the plan that continues the run.

    Args:
        path: The run folder.
        plan: The plan that continues the run.
        allowed: Keys that the user allows to differ, from `--allow-change`.

    Raises:
        WmtpError: There are differences that are not allowed, or that the progress of the run does not
            permit, such as fewer steps, another optimiser, another measure of the best state or other
            settings of the evaluation; or the run is finished, and the plan does not train it further.
    """
    was = read_run(path)
    _refuse(path, _changes(was, plan, safe=SAFE, allowed=allowed))
    before, now = was.get("params", {}), plan.params
    done = _steps_done(path)
    lacking = _needed_to_train_further(was, now)
    measured = done.get("evaluate") == (
        was[LAST_STEP["policy"]] if lacking == "train.patience" else _planned(now, was, "train")
    )
    if measured and any(before.get(key) != now[key] for key in now if key.startswith("evaluate.")):
        raise WmtpError(
            f"the run `{path}` was evaluated with other settings of `[evaluate]`",
            hint="measure it again: "
            + python_command("weighted_mtp_core", "evaluate", str(path))
            + " --help",
        )
    if was.get("status") == "FINISHED" and lacking is not None:
        raise WmtpError(f"the run `{path}` is finished", hint=f"raise `{lacking}` to train it further")
    _refuse_fewer_steps(path, plan, done)
    chose, chooses = _selects_by(before), _selects_by(now)
    if "policy" in done and chose != chooses:  # scores of different measures cannot be compared
        raise WmtpError(
            f"the run `{path}` chooses the state to keep by `{chose}`; `train.select_by` is now `{chooses}`",
            hint="undo the change, or begin a new run",
        )
    _refuse_other_optimiser_state(path, before, now, done)


def _needed_to_train_further(was: Mapping[str, Any], now: Mapping[str, str]) -> str | None:
    """Return the key that must be raised to train a finished run further.

    The result is None if the plan has raised or removed this key, or if the plan's steps are unknown.
    """
    before = was.get("params", {})
    if was.get(LAST_STEP["policy"], 0) < was.get(STEPS["policy"], 0):
        old, new = (float(params.get("train.patience", inf)) for params in (before, now))
        return None if new > old else "train.patience"
    old_steps, steps = (_planned(params, was, "train") for params in (before, now))
    if steps is None or steps > (old_steps or 0):
        return None
    return "train.steps" if "train.steps" in now else "train.epochs"


def _planned(params: Mapping[str, str], was: Mapping[str, Any], key: str) -> int | None:
    """Return the planned number of steps of the table `key` (`train` or `critic.train`); None if unknown.

    The number of steps for a number of epochs follows from the batches per epoch that the run has recorded.
    """
    if f"{key}.steps" in params:
        return int(params[f"{key}.steps"])
    epochs, batches = params.get(f"{key}.epochs"), was.get(f"{key}.batches_per_epoch")
    if epochs is None or batches is None:
        return None
    return TrainTable(epochs=float(epochs)).for_epochs(batches).steps


def _selects_by(params: Mapping[str, str]) -> str:
    default = default_selection(params.get("model.train"), params.get("loss.heads"))
    return params.get("train.select_by") or default


def _refuse_fewer_steps(path: Path, plan: Plan, done: Mapping[str, int]) -> None:
    was = read_run(path)
    for stage, key in (("policy", "train"), ("critic", "critic.train")):
        steps = _planned(plan.params, was, key)
        if steps is not None and steps < done.get(stage, 0):
            raise WmtpError(
                f"the run `{path}` has done {done[stage]} steps of stage `{stage}`; `{key}.steps` is {steps}",
                hint=f"set `{key}.steps` to {done[stage]} or more, or begin a new run",
            )
    before, now = (_planned(params, was, "critic.train") for params in (was.get("params", {}), plan.params))
    if "policy" in done and None not in {before, now} and before != now:
        raise WmtpError(
            f"the run `{path}` has ended stage `critic` after {before} steps; `critic.train.steps` is {now}",
            hint="undo the change, or begin a new run",
        )


def _refuse_other_optimiser_state(
    path: Path, before: Mapping[str, str], now: Mapping[str, str], done: Mapping[str, int]
) -> None:
    """Refuse another optimiser or other trained parameters for a stage that has begun.

    `--allow-change` cannot allow these changes. After stage 2 has begun, changes for stage 1 are accepted.
    """
    keys = (
        ("policy", "train.optimiser.name", "adamw"),
        ("policy", "model.train", "all"),
        ("critic", "critic.train.optimiser.name", "adamw"),
    )
    for stage, key, default in keys:
        used, uses = (params.get(key, default) for params in (before, now))
        if used != uses and stage in done and not (stage == "critic" and "policy" in done):
            raise WmtpError(
                f"the run `{path}` has begun stage `{stage}` with `{used}`, whose state `{uses}` cannot use",
                hint=f"undo the change of `{key}`, or begin a new run",
            )


def _steps_done(path: Path) -> dict[str, int]:
    """Return the last step of each stage that has begun, according to the journal and the snapshots."""
    folder = RunFolder(path=path)
    history = RunHistory()
    for line in read_journal(folder.journal, kinds=("metrics",)) if folder.journal.is_file() else ():
        history.add(line)
    done = {
        stage: max(points[-1].step for points in metrics.values())
        for stage, metrics in history.metrics.items()
    }
    was = read_run(path)
    ended = was.get(LAST_STEP["critic"], _planned(was.get("params", {}), was, "critic.train"))
    if "critic" in done and ended is not None:
        done["critic"] = min(done["critic"], int(ended))  # its final measures are recorded one step later
    for stage, step in steps_of_snapshots(folder.checkpoints):
        done[stage] = max(step, done.get(stage, 0))
    return done


def refuse_other_data(folder: RunFolder, version: DatasetVersion, *, allowed: Sequence[str]) -> bool:
    """Compare the data with the data that the run has recorded, and record the data.

    Returns:
        Whether the data differ from the recorded data, which is also the case for a new run.

    Raises:
        WmtpError: The data of a resumed run differ, and `allowed` contains neither `data.sha256` nor `data`.
    """
    key = "data.sha256"
    facts = read_run(folder.path)
    was = facts.get(key)
    if was is not None and was != version.sha256:
        _refuse(folder.path, _differences({key: was}, {key: version.sha256}, allowed=allowed))
        folder.record(**{CHANGED: sorted({*facts.get(CHANGED, ()), key})})
    folder.record(**{key: version.sha256})
    return was != version.sha256


def fingerprint(distributed: Distributed = SINGLE_PROCESS) -> dict[str, str]:
    """Return the properties of torch, machine and processes that affect the exact result of training."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "processes": str(distributed.size),
    }


def other_machine(path: Path, distributed: Distributed) -> str | None:
    """Return a warning if a property in `fingerprint` has changed since the run was last executed.

    Return None if no recorded property has changed.
    """
    was, now = read_run(path).get("fingerprint", {}), fingerprint(distributed)
    differing = [f"{key} {was[key]} -> {now[key]}" for key in now if key in was and was[key] != now[key]]
    if not differing:
        return None
    return (
        f"WARNING: this machine differs from the one that last executed the run ({', '.join(differing)}): "
        "from here on, results are equal up to rounding (about 1e-4 after some hundred steps), not bit for "
        "bit"
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
