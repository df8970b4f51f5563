"""Read finished runs from MLflow as arms of a comparison. This module imports mlflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen
from mlflow import MlflowClient
from mlflow.entities import Run

from weighted_mtp_core import run_tags
from weighted_mtp_core.api import BuildContext, RunInfo
from weighted_mtp_core.builtin._mlflow_errors import diagnose
from weighted_mtp_core.builtin._mlflow_tracker import MlflowTracker
from weighted_mtp_core.builtin.mlflow import MlflowOptions, build_mlflow
from weighted_mtp_core.compare.arms import ALGORITHM, EQUAL, is_below, refuse_unequal
from weighted_mtp_core.compare.measures import RunMeasures
from weighted_mtp_core.compare.mlflow_record import describe_comparison
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import did_you_mean, quoted
from weighted_mtp_core.tracking.run_history import Point

_PAGE = 1000
"""Number of runs in one answer of the store."""


@frozen(kw_only=True, eq=False)
class StoredRuns:
    """Runs from an MLflow store that can be compared.

    Attributes:
        tracker: A tracker for the store; at first, its method `start` has not been called.
        runs: The runs, keyed by arm and seed; the name of a run is the name of its arm.
        measures: The measures of the runs, keyed by arm and seed.
    """

    tracker: MlflowTracker
    runs: dict[str, dict[int, Run]]
    measures: dict[str, dict[int, RunMeasures]]

    @property
    def seeds(self) -> list[int]:
        """All seeds of all arms."""
        return sorted({seed for by_seed in self.runs.values() for seed in by_seed})

    @property
    def all(self) -> list[Run]:
        """All runs of all arms as a list."""
        return [run for by_seed in self.runs.values() for run in by_seed.values()]

    def describe(self, folder: Path) -> RunInfo:
        """Describe the comparison as an MLflow run."""
        with _client(self.tracker.uri) as client:
            ids = {run.info.experiment_id for run in self.all}
            experiments = {client.get_experiment(each).name for each in ids}
        return describe_comparison(
            tuple(self.runs),
            self.seeds,
            run_id=folder.name,
            experiments=experiments,
            prefix=MlflowOptions().experiment_prefix,
            folder=folder,
        )

    def adopt(self, parent: str) -> None:
        """Tag the compared runs as children of the run with the id `parent`."""
        with _client(self.tracker.uri) as client:
            for run in self.all:
                client.set_tag(run.info.run_id, run_tags.PARENT_RUN, parent)


def read_stored(
    *, experiments: Sequence[str], run_ids: Sequence[str], allowed: Sequence[str], storage: Path
) -> StoredRuns:
    """Read all finished runs of some experiments, and additional runs by their ids.

    Runs without a seed are left out; of several runs with the same name and seed, only the latest is kept.

    Args:
        experiments: Names of experiments, of which all finished runs with a seed are read.
        run_ids: Ids of additional runs, in MLflow or of their run folders.
        allowed: Keys that may differ between arms, although the comparison is then unfair.
        storage: The storage root, which contains the store that is used if no store is configured.

    Raises:
        WmtpError: An experiment or a run does not exist, a run named by its id is not finished, no run is
            left, the store cannot be read, or the arms cannot be compared.
    """
    tracker = build_mlflow(MlflowOptions(), BuildContext(seed=0, storage=storage))
    assert isinstance(tracker, MlflowTracker)  # because the tracker is enabled
    with _client(tracker.uri) as client:
        found = [run for name in experiments for run in _of_experiment(client, name)]
        found += [_by_id(client, each) for each in run_ids]
        arms = _group(found)
        measures = {
            arm: {seed: _measure(client, run) for seed, run in sorted(by_seed.items())}
            for arm, by_seed in arms.items()
        }
    if not arms:
        raise WmtpError(
            "there is no finished run with a seed", hint="see: mlflow runs list --experiment-id ID"
        )
    first, by_seed = next(iter(arms.items()))
    params = next(iter(by_seed.values())).data.params
    for arm, by_seed in arms.items():
        seed_0 = min(by_seed)
        for seed, run in sorted(by_seed.items()):
            _refuse_changed(run, allowed=allowed)
            refuse_unequal((first, params), (arm, run.data.params), allowed=allowed)
            refuse_unequal(
                (f"{arm}, seed {seed_0}", by_seed[seed_0].data.params),
                (f"{arm}, seed {seed}", run.data.params),
                allowed=allowed,
                tables=ALGORITHM,
            )
        if run_tags.SOURCE_SHA256 not in allowed:
            _refuse_mixed_source(arm, by_seed)
    return StoredRuns(tracker=tracker, runs=arms, measures=measures)


def _refuse_changed(run: Run, *, allowed: Sequence[str]) -> None:
    """Refuse a run that was resumed with another recipe; its params in MLflow describe its first steps."""
    prefix = run_tags.CHANGED_PREFIX
    changed = sorted(tag.removeprefix(prefix) for tag in run.data.tags if tag.startswith(prefix))
    for key in changed:
        if is_below(key, (*EQUAL, *ALGORITHM)) and not is_below(key, allowed):
            raise WmtpError(
                f"the run `{run.info.run_id}` of `{run.info.run_name}` was resumed with another `{key}`",
                hint=f"leave it out: name runs with `--runs`; or allow it: --allow-difference {key}",
            )


def _refuse_mixed_source(arm: str, by_seed: Mapping[int, Run]) -> None:
    """Refuse an arm whose seeds were not all trained with the same code."""
    sources: dict[str, list[str]] = {}
    for seed, run in sorted(by_seed.items()):
        source = run.data.tags.get(run_tags.SOURCE_SHA256, "unknown")
        sources.setdefault(source[:12], []).append(str(seed))
    if len(sources) > 1:
        which = "; ".join(f"`{source}` for seed {', '.join(seeds)}" for source, seeds in sources.items())
        raise WmtpError(
            f"the runs of `{arm}` used different code by their tag `{run_tags.SOURCE_SHA256}`: {which}",
            hint="name the runs of one source with `--runs`, or allow the difference: "
            f"--allow-difference {run_tags.SOURCE_SHA256}",
        )


def _of_experiment(client: MlflowClient, name: str) -> list[Run]:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        names = [each.name for each in client.search_experiments()]
        hint = did_you_mean(name, names) or f"there are {quoted(sorted(names))}"
        raise WmtpError(f"there is no experiment `{name}`", hint=hint)
    found: list[Run] = []
    token: str | None = ""
    while token is not None:
        page = client.search_runs(
            [experiment.experiment_id], "status = 'FINISHED'", max_results=_PAGE, page_token=token or None
        )
        found += page
        token = page.token or None
    return found


def _by_id(client: MlflowClient, run_id: str) -> Run:
    every = [each.experiment_id for each in client.search_experiments()]
    for key in ("attributes.run_id", f"tags.`{run_tags.RUN_ID}`"):
        found = client.search_runs(every, f"{key} = '{run_id}'", max_results=1)
        if found:
            if (status := found[0].info.status) != "FINISHED":
                raise WmtpError(f"the run `{run_id}` is not finished: its status is {status}")
            return found[0]
    raise WmtpError(f"the store has no run `{run_id}`")


def _group(found: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Group runs by name and seed; of several runs with the same name and seed, only the latest is kept."""
    arms: dict[str, dict[int, Run]] = {}
    for run in found:
        seed = run.data.params.get("run.seed")
        if seed is None:  # the run is a comparison or belongs to another program
            continue
        by_seed = arms.setdefault(run.info.run_name, {})
        other = by_seed.get(int(seed))
        if other is None or other.info.start_time < run.info.start_time:
            by_seed[int(seed)] = run
    return arms


def _measure(client: MlflowClient, run: Run) -> RunMeasures:
    return RunMeasures.make(
        {
            name: sorted(
                Point(point.step, point.value, point.timestamp)
                for point in client.get_metric_history(run.info.run_id, name)
            )
            for name in run.data.metrics
        }
    )


@contextmanager
def _client(uri: str) -> Iterator[MlflowClient]:
    """Yield a client; an exception of MLflow in the block becomes a `WmtpError` with a one-line message."""
    try:
        yield MlflowClient(tracking_uri=uri)
    except WmtpError:
        raise
    except Exception as error:
        raise diagnose(error, uri).as_error() from error
