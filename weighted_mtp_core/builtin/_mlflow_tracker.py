"""The tracker behind `core.mlflow`. Importing this module imports mlflow, which takes 2 s and 160 MB.

The tracker uses `MlflowClient` with an explicit run id, because MLflow's fluent API prints text, ends runs
and adds other tags. Core retries failed calls (`tracking/retrying_uploader.py`), so the client's own retries,
which would block a call for up to 247 s, are disabled.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from attrs import asdict
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    Experiment,
    InputTag,
    LifecycleStage,
    Metric,
    Param,
    Run,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from weighted_mtp_core import run_tags
from weighted_mtp_core.api import DatasetVersion, KeptRun, MetricPoint, RunInfo, RunOutcome, Tracker
from weighted_mtp_core.builtin import _mlflow_limits as limits
from weighted_mtp_core.builtin._mlflow_artifacts import check_store, drop_local_checkpoint, store
from weighted_mtp_core.builtin._mlflow_errors import NotDeliveredError, diagnose, is_crowded
from weighted_mtp_core.builtin._mlflow_uri import local_path
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import python_command
from weighted_mtp_core.redaction import redact
from weighted_mtp_core.tracking.names import check_path_name

_DIGEST = 36  # MLflow accepts no longer digest; the param `data.sha256` has all digits


class MlflowTracker(Tracker):
    """Records a run in an MLflow store.

    The tag `wmtp.run_id` identifies a run. The tracker skips points of a metric up to the highest step in the
    store, so neither a lost answer nor a resumed run duplicates points.

    Args:
        uri: The tracking URI.
        artifact_root: URI under which a new experiment stores its files; None for the default
            that `MlflowOptions` describes.
        keep_local: If False, the local best checkpoint is deleted as soon as a remote store has it.

    Attributes:
        uri: The tracking URI.
        run_id: The id of the run in MLflow; empty before `start`.
    """

    def __init__(self, *, uri: str, artifact_root: str | None, keep_local: bool = True) -> None:
        self.uri = uri
        self._keep_local = keep_local
        self._artifact_root = artifact_root
        self._path = local_path(uri)
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self.run_id = ""
        self._last_step: dict[str, int] | None = None
        warnings.filterwarnings("ignore", message="The ``noload`` loader")  # caused by MLflow
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def start(self, run: RunInfo) -> None:
        """Create the run in its experiment, or reopen it; add missing params and datasets, and set the tags.

        Raises:
            WmtpError: The name of the experiment is not valid, or the call failed and a retry will not help,
                for example because of a wrong login, an unknown host or a deleted experiment.
            NotDeliveredError: The call failed, but a retry may help.
        """
        check_path_name(run.experiment, what="an experiment")
        with self._diagnosed(starting=not self.run_id), self._local_store_lock():
            if self._client is None:
                self._client = MlflowClient(tracking_uri=self.uri)
            self._experiment_id = self._find_experiment(run.experiment)
            found = self._find(run)
            self.run_id = (found or self._create(run)).info.run_id
            if found is None:
                self._check_store()
            self._describe(run)

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        """Record the points that the store does not have."""
        with self._diagnosed():
            last = self._known_steps()
            new = [point for point in points if point.step > last.get(point.name, -1)]
            self._last_step = None  # unknown until the store confirms
            if new:
                metrics = [Metric(point.name, point.value, point.time_ms, point.step) for point in new]
                self._open.log_batch(self.run_id, metrics=metrics)
            self._last_step = {**last, **{point.name: point.step for point in new}}

    def log_artifact(self, path: Path, subdir: str) -> None:
        """Store a file among the artifacts of the run."""
        with self._diagnosed(what="the artifact store of "):
            store(self._open, self.run_id, path, subdir, uri=self.uri)
            if not self._keep_local:
                drop_local_checkpoint(self._open, self.run_id, path, subdir, uri=self.uri)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or overwrite tags."""
        with self._diagnosed():
            self._send_tags(tags)

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        for batch in limits.batches(limits.legal(tags, longest=limits.TAG_VALUE)):
            self._open.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in batch.items()])

    def finish(self, outcome: RunOutcome, *, time_ms: int | None = None) -> None:
        """Set the status and the end time of the run."""
        with self._diagnosed():
            self._open.set_terminated(self.run_id, outcome.value, end_time=time_ms)

    def store(self) -> str:
        """Return the tracking URI without secrets; the URI of a local store contains its real path."""
        if self._path is None:
            return redact(self.uri.rstrip("/"))
        return f"{self.uri.partition(':')[0]}:///{self._path.resolve()}"

    def kept(self) -> KeptRun:
        """Return the run's id in MLflow, empty if the run was deleted, and the last step of each metric."""
        self._last_step = None
        with self._diagnosed():
            try:
                return KeptRun(run=self.run_id, last_step=self._known_steps())
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return KeptRun(run="", last_step={})

    def where(self) -> str:
        """Return the URL of the run, or the command that shows the store."""
        if self._path is None and not self.uri.startswith("postgresql"):
            return f"{self.uri.rstrip('/')}/#/experiments/{self._experiment_id}/runs/{self.run_id}"
        allow = "MLFLOW_ALLOW_FILE_STORE=true " if self.uri.startswith("file:") else ""
        return allow + python_command("mlflow", "ui", "--backend-store-uri", self.uri)

    # ------------------------------------------------------------------- experiment and run

    def _check_store(self) -> None:
        """Stop a new run if its files probably cannot be stored; other failures only delay their upload."""
        try:
            check_store(self._open, self.run_id)
        except WmtpError:
            raise
        except Exception as error:
            found = diagnose(error, self.uri, what="the artifact store of ")
            if found.lasting:
                raise found.as_error() from error

    @property
    def _open(self) -> MlflowClient:
        if self._client is None:
            raise AssertionError("`start` creates the client")
        return self._client

    @contextmanager
    def _diagnosed(self, *, starting: bool = False, what: str = "") -> Iterator[None]:
        """Convert an exception of MLflow to a one-line error; its class decides whether core retries."""
        try:
            yield
        except WmtpError:
            raise
        except Exception as error:
            found = diagnose(error, self.uri, what=what)
            if found.hopeless or (starting and found.lasting):
                raise found.as_error() from error
            raise NotDeliveredError(found.text) from error

    @contextmanager
    def _local_store_lock(self) -> Iterator[None]:
        """Let only one process at a time open a local store, because concurrent migrations crash."""
        if self._path is None:
            yield
            return
        if self.uri.startswith("file:"):
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self._path}.lock", timeout=120):
            if self.uri.startswith("sqlite:") and not self._path.exists():
                _create_database(self.uri, self._path)
            yield

    def _find_experiment(self, name: str) -> str:
        """Return the id of an experiment; if there is no such experiment, create it."""
        client = self._open
        experiment: Experiment | None = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(client.create_experiment(name, artifact_location=self._artifact_location(name)))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage == LifecycleStage.DELETED:
            known = experiment.experiment_id if experiment else "ID"
            raise WmtpError(
                f"the experiment `{name}` was deleted",
                hint=f"restore it: MLFLOW_TRACKING_URI={shlex.quote(self.uri)} "
                + python_command("mlflow", "experiments", "restore", "--experiment-id", str(known))
                + "; or choose another one: --set run.experiment=NAME",
            )
        return str(experiment.experiment_id)

    def _artifact_location(self, experiment: str) -> str | None:
        if self._artifact_root is not None:
            return f"{self._artifact_root.rstrip('/')}/{experiment}"
        if self._path is None or self.uri.startswith("file:"):
            return None
        return (self._path.parent / "mlartifacts" / experiment).as_uri()

    def _find(self, run: RunInfo) -> Run | None:
        found = self._open.search_runs(
            [self._experiment_id],
            filter_string=f"tags.`{run_tags.RUN_ID}` = '{run.run_id}'",
            run_view_type=ViewType.ACTIVE_ONLY,
            max_results=1,
        )
        return found[0] if found else None

    def _create(self, run: RunInfo) -> Run:
        return self._open.create_run(
            self._experiment_id,
            start_time=run.started_ms,
            run_name=run.name,
            tags={run_tags.RUN_ID: run.run_id, "mlflow.source.name": "weighted_mtp_core"},
        )

    def _describe(self, run: RunInfo) -> None:
        """Add missing params and datasets, then set the tags, which must override tags of MLflow itself."""
        client = self._open
        kept = client.get_run(self.run_id)
        if kept.info.status != "RUNNING":
            client.update_run(self.run_id, status="RUNNING")
        params = limits.legal(run.params, longest=limits.PARAM_VALUE)
        missing = {key: value for key, value in params.items() if key not in kept.data.params}
        for batch in limits.batches(missing):
            client.log_batch(self.run_id, params=[Param(key, value) for key, value in batch.items()])
        if run.datasets:
            self._describe_data(run.datasets)
        self._send_tags(run.tags)

    def _describe_data(self, versions: Sequence[DatasetVersion]) -> None:
        """Log the run's datasets; retry once, because runs that start together may insert the same row."""
        datasets = [_dataset_input(version) for version in versions]
        try:
            self._open.log_inputs(self.run_id, datasets=datasets)
        except MlflowException as error:
            if not is_crowded(error):
                raise
            self._open.log_inputs(self.run_id, datasets=datasets)

    def _known_steps(self) -> dict[str, int]:
        """Return the highest step of every metric in the store."""
        if self._last_step is None:
            run = self._open.get_run(self.run_id)
            if run.info.lifecycle_stage == LifecycleStage.DELETED:
                raise MlflowException("the run was deleted", RESOURCE_DOES_NOT_EXIST)
            metrics = run.data._metric_objs  # noqa: SLF001 - the public dict has no steps
            self._last_step = {metric.key: metric.step for metric in metrics}
        return self._last_step


def _create_database(uri: str, path: Path) -> None:
    """Create a store under another name and rename it, because MLflow cannot open an incomplete store."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    address, query, options = uri.partition("?")
    MlflowClient(tracking_uri=f"{address}.new{query}{options}").search_experiments(max_results=1)
    new.rename(path)


def _dataset_input(version: DatasetVersion) -> DatasetInput:
    return DatasetInput(
        dataset=Dataset(
            name=version.name,
            digest=version.sha256[:_DIGEST],
            source_type="local",
            source=json.dumps(asdict(version)),
        ),
        tags=[InputTag("mlflow.data.context", "training")],
    )
