"""The runs of a comparison, and how the folders with their results are found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from weighted_mtp_core.compare.arms import Arm, is_below
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.tracking.run_folder import CHANGED, is_held, read_run

_SAME_RESULT = ("checkpoint", "run.resume", "run.tags", "tracker")
"""Keys that do not affect the results of a run, in addition to `Plan.same_result`."""


@frozen(kw_only=True)
class WantedRun:
    """The properties by which the run folders of a job are found; an instance can be sent to other machines.

    Attributes:
        folder: The folder of all runs with the name of the job's arm.
        params: Recipe and seed as dotted keys, without the keys that do not affect the results.
        distributions: Version and source of the code on which the result depends; see `Plan.distributions`.
        same_result: Keys of a recipe that do not affect the results.
    """

    folder: Path
    params: Mapping[str, str]
    distributions: Mapping[str, str]
    same_result: Sequence[str]

    def finished(self) -> Path | None:
        """Return the latest finished run with this recipe, source code and seed; None if there is none."""
        return next((path for path in self._runs() if self.is_finished(path)), None)

    def is_running(self) -> bool:
        """Return whether some process, such as one of another comparison, executes or closes the run."""
        return any(read_run(path).get("status") != "FINISHED" and is_held(path) for path in self._runs())

    def is_finished(self, path: Path) -> bool:
        """Return whether a run folder contains a finished run with this recipe, source code and seed."""
        facts = read_run(path)
        return facts.get("status") == "FINISHED" and self._matches(facts)

    def _runs(self) -> Iterator[Path]:
        for file in sorted(self.folder.glob("[!.]*/run.json"), reverse=True):
            if self._matches(read_run(file.parent)):
                yield file.parent

    def _matches(self, facts: Mapping[str, Any]) -> bool:
        if facts.get(CHANGED):  # some of its steps used another recipe, other code or other data
            return False
        params = _without(facts.get("params", {}), self.same_result)
        return params == self.params and dict(facts.get("distributions", {})) == self.distributions


@frozen(kw_only=True)
class Job:
    """One run of a comparison."""

    arm: Arm
    seed: int

    @property
    def label(self) -> str:
        """The name of the job in messages; the job's log file is called `<label>.log`."""
        return f"{self.arm.name}-seed{self.seed}"

    @property
    def wanted(self) -> WantedRun:
        """The properties by which the run folders of this job are found."""
        plan, identity = self.arm.plan, self.arm.identity(self.seed)
        same_result = (*_SAME_RESULT, *plan.same_result)
        return WantedRun(
            folder=plan.runs_folder / plan.experiment / self.arm.name,
            params=_without(identity["params"], same_result),
            distributions=identity["distributions"],
            same_result=same_result,
        )

    def command(self) -> list[str]:
        """Return the command-line arguments with which Python executes or resumes the run."""
        preset = ["--preset", self.arm.preset] if self.arm.preset else []
        changes = [*self.arm.overrides, f"run.seed={self.seed}"]
        sets = [part for change in changes for part in ("--set", change)]
        return ["-m", "weighted_mtp_core", "run", str(self.arm.recipe), *preset, *sets]


def plan_jobs(arms: Sequence[Arm], seeds: Sequence[int]) -> list[Job]:
    """Return all jobs in order of seeds, so that all arms progress equally."""
    return [Job(arm=arm, seed=seed) for seed in seeds for arm in arms]


def refuse_other_data(runs: Mapping[Job, Path], *, allowed: Sequence[str] = ()) -> None:
    """Refuse runs with the same `[data]` table but different data, because a file has changed in between.

    Args:
        runs: The run folder of each finished job.
        allowed: Keys that may differ between runs; with `data.sha256` or `data`, no run is refused.

    Raises:
        WmtpError: The data of two runs differ.
    """
    if is_below("data.sha256", allowed):
        return
    first: dict[str, Path] = {}
    for job, run in runs.items():
        table = str(sorted(pair for pair in job.wanted.params.items() if is_below(pair[0], ["data"])))
        other = first.setdefault(table, run)
        was, now = (read_run(each).get("data.sha256", "unknown")[:12] for each in (other, run))
        if was != now:
            raise WmtpError(
                f"the data changed between runs: their SHA-256 is {was} in `{other}` and {now} in `{run}`",
                hint="delete the folders of the runs with the old data, restore the old data, or allow the "
                "difference: --allow-difference data.sha256",
            )


def _without(params: Mapping[str, str], tables: Sequence[str]) -> dict[str, str]:
    return {key: value for key, value in params.items() if not is_below(key, tables)}
