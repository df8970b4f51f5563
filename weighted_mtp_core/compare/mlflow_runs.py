"""Runs that lie in MLflow already, as arms. Importing this module imports mlflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen
from mlflow import MlflowClient
from mlflow.entities import Run

from weighted_mtp_core.api import BuildContext, RunInfo
from weighted_mtp_core.builtin._mlflow_errors import diagnose
from weighted_mtp_core.builtin._mlflow_tracker import RUN_ID_TAG, MlflowTracker
from weighted_mtp_core.builtin.mlflow import MlflowOptions, build_mlflow
from weighted_mtp_core.compare.arms import refuse_unequal
from weighted_mtp_core.compare.measures import RunMeasures
from weighted_mtp_core.compare.mlflow_record import PARENT_TAG
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import did_you_mean, quoted

_MOST = 1000


@frozen(kw_only=True, eq=False)
class Stored:
    """Runs of an MLflow store that can be compared.

    Attributes:
        tracker: Of the store; no run is open there.
        runs: By arm, which is the run's name, and seed.
        measures: The same, as what they measured.
    """

    tracker: MlflowTracker
    runs: dict[str, dict[int, Run]]
    measures: dict[str, dict[int, RunMeasures]]

    @property
    def seeds(self) -> list[int]:
        """All seeds of all arms."""
        return sorted({seed for by_seed in self.runs.values() for seed in by_seed})

    def describe(self, folder: Path) -> RunInfo:
        """Return the comparison as a run."""
        every = [run for by_seed in self.runs.values() for run in by_seed.values()]
        experiments = {run.info.experiment_id for run in every}
        prefix = MlflowOptions().experiment_prefix
        with self._diagnosed():
            name = self._client.get_experiment(experiments.pop()).name
        return RunInfo(
            run_id=f"compare-{folder.name}",
            name=folder.name,
            experiment=f"{prefix}/compare" if experiments else name,
            params={"compare.arms": " ".join(self.runs), "compare.seeds": " ".join(map(str, self.seeds))},
            tags={"algo": "compare", "wmtp.compare": " ".join(self.runs)},
            datasets=(),
            folder=folder,
        )

    def adopt(self, parent: str) -> None:
        """Tag the runs as children."""
        with self._diagnosed():
            for by_seed in self.runs.values():
                for run in by_seed.values():
                    self._client.set_tag(run.info.run_id, PARENT_TAG, parent)

    @property
    def _client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.tracker.uri)

    @contextmanager
    def _diagnosed(self) -> Iterator[None]:
        with _diagnosed(self.tracker.uri):
            yield


def read_stored(
    *, experiments: Sequence[str], run_ids: Sequence[str], allowed: Sequence[str], storage: Path
) -> Stored:
    """Read the finished runs of experiments, and runs by their id (MLflow's, or the run folder's).

    Args:
        experiments: Names; all their finished runs that have a seed are taken.
        run_ids: Further runs; the first arm is that of the first run.
        allowed: Keys that may differ although that is unfair.
        storage: Where the store lies if nothing is configured.

    Raises:
        WmtpError: Nothing is found, the store cannot be read, or the arms are not comparable.
    """
    context = BuildContext(seed=0, storage=storage)
    tracker = build_mlflow(MlflowOptions(), context)
    assert isinstance(tracker, MlflowTracker)  # it is enabled
    client = MlflowClient(tracking_uri=tracker.uri)
    with _diagnosed(tracker.uri):
        found = [run for name in experiments for run in _of_experiment(client, name)]
        found += [_by_id(client, each) for each in run_ids]
        arms = _group(found)
        measures = {
            arm: {seed: _measure(client, run) for seed, run in sorted(by_seed.items())}
            for arm, by_seed in arms.items()
        }
    if not arms:
        raise WmtpError("there is no finished run with a seed", hint="see: mlflow runs list")
    first = next(iter(arms))
    for arm, by_seed in arms.items():
        for run in by_seed.values():
            refuse_unequal((first, _any(arms[first]).data.params), (arm, run.data.params), allowed=allowed)
    return Stored(tracker=tracker, runs=arms, measures=measures)


def _any(by_seed: dict[int, Run]) -> Run:
    return next(iter(by_seed.values()))


def _of_experiment(client: MlflowClient, name: str) -> list[Run]:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        names = [each.name for each in client.search_experiments()]
        hint = did_you_mean(name, names) or f"there are {quoted(sorted(names))}"
        raise WmtpError(f"there is no experiment `{name}`", hint=hint)
    return list(client.search_runs([experiment.experiment_id], "status = 'FINISHED'", max_results=_MOST))


def _by_id(client: MlflowClient, run_id: str) -> Run:
    every = [each.experiment_id for each in client.search_experiments()]
    for key in ("attributes.run_id", f"tags.`{RUN_ID_TAG}`"):
        found = client.search_runs(every, f"{key} = '{run_id}'", max_results=1)
        if found:
            return found[0]
    raise WmtpError(f"the store has no run `{run_id}`")


def _group(found: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Return runs by name and seed; of several with the same, the one that began last."""
    arms: dict[str, dict[int, Run]] = {}
    for run in found:
        seed = run.data.params.get("run.seed")
        if seed is None:  # a comparison, or a run of another program
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
                (point.step, point.value, point.timestamp / 1000)
                for point in client.get_metric_history(run.info.run_id, name)
            )
            for name in run.data.metrics
        }
    )


@contextmanager
def _diagnosed(uri: str) -> Iterator[None]:
    """Turn what MLflow raises into one line."""
    try:
        yield
    except WmtpError:
        raise
    except Exception as error:
        raise diagnose(error, uri).as_error() from error
