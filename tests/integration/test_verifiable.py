"""The whole recipe `verifiable` on every kind of store: MLflow's client reads back what the run recorded."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import stack as servers
from attrs import frozen
from weighted_mtp_core.builtin import _mlflow_limits as limits
from weighted_mtp_core.tracking.journal import read_journal

pytestmark = pytest.mark.slow

RECIPE = (
    *("run", Path(__file__).parents[2] / "configs" / "verifiable.toml", "--preset", "ci"),
    *("--set", "data.options.problems=40", "--set", "data.options.twins=1"),
    *("--set", "critic.allow_uninformative_critic=true"),  # the critic trains for only eight steps
)
STORES = ("proxied", "direct", "sqlite", "file")
ARTIFACTS = {"proxied": "mlflow-artifacts:/", "direct": "s3://", "sqlite": "file:///", "file": "file:///"}


@frozen(kw_only=True)
class Run:
    """A run that has ended, and the URI of its store, which is None for the server."""

    returncode: int
    stdout: str
    stderr: str
    folder: Path
    uri: str | None

    def recorded(self, kind):
        """The fields of every journal line of one kind, merged; later lines win."""
        merged = {}
        for entry in read_journal(self.folder / "metrics.jsonl", kinds=(kind,)):
            merged |= entry.fields[kind]
        return merged


@pytest.fixture(scope="module")
def runs(wmtp, tmp_path_factory):
    """The recipe, run once for each store, two at a time."""

    def run(store):
        cwd = tmp_path_factory.mktemp(store)
        uri = {"sqlite": f"sqlite:///{cwd}/own.db", "file": f"file://{cwd}/mlflow"}.get(store)
        options = {"direct": f'experiment_prefix="direct",artifact_root="s3://{servers.BUCKET}/direct"'}
        tracker = f'tracker=[{{use="core.mlflow",options={{{options.get(store, "")}}}}}]'
        changes = {"MLFLOW_TRACKING_URI": uri} if uri else {}
        process = wmtp(*RECIPE, "--set", tracker, cwd=cwd, **changes)
        stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stdout + stderr
        (folder,) = (file.parent for file in (cwd / "storage" / "runs").rglob("run.json"))
        return Run(returncode=process.returncode, stdout=stdout, stderr=stderr, folder=folder, uri=uri)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(STORES, pool.map(run, STORES), strict=True))


@pytest.fixture(params=STORES)
def store(request):
    return request.param


@pytest.fixture
def run(runs, store):
    return runs[store]


@pytest.fixture
def kept(run, stored, monkeypatch):
    """The run as MLflow's client reads it."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return stored(run.folder, run.uri)


def test_the_run_is_finished_in_its_experiment(kept, store):
    experiment = kept.client.get_experiment(kept.run.info.experiment_id)

    assert experiment.name == ("direct/verifiable" if store == "direct" else "weighted_mtp/verifiable")
    assert kept.status == "FINISHED"
    assert kept.run.info.start_time < kept.run.info.end_time


def test_every_metric_of_the_journal_is_there_once(kept):
    assert kept.points() == kept.journalled()
    assert {"value_loss", "success_ratio_mean", "weight_entropy"} <= set(kept.run.data.metrics)


def test_params_tags_and_data_are_there(kept, run):
    params, tags = run.recorded("params"), run.recorded("tags")
    (data,) = kept.run.inputs.dataset_inputs

    assert kept.run.data.params == limits.legal(params, longest=limits.PARAM_VALUE)
    assert limits.legal(tags, longest=limits.TAG_VALUE).items() <= kept.run.data.tags.items()
    assert {"algo", "model_version", "wmtp.weighting", "wmtp.critic", "wmtp.recipe_sha256"} <= set(tags)
    assert (data.dataset.name, data.dataset.digest) == (params["data.name"], params["data.sha256"][:36])


def test_every_file_is_there_with_every_byte(kept, run, store):
    stored = sorted(walk(kept.client, kept.run.info.run_id))

    assert {"recipe.toml", "report.md", "checkpoints/best_model.pt", "logs/training.log"} < set(stored)
    assert any(name.startswith("evaluation/") for name in stored)
    assert kept.run.info.artifact_uri.startswith(ARTIFACTS[store])
    for name in stored:
        local = (run.folder / name).read_bytes()
        assert hashlib.sha256(kept.file(name)).digest() == hashlib.sha256(local).digest(), name


def walk(client, run_id, folder=None):
    for each in client.list_artifacts(run_id, folder):
        if each.is_dir:
            yield from walk(client, run_id, each.path)
        else:
            yield each.path


def test_the_page_of_the_run_shows_its_metrics_in_a_browser(stack, runs, stored, browser):
    info = stored(runs["proxied"].folder).run.info
    words = ("value_loss", "success_ratio_mean", "weight_entropy", "Finished")

    browser.open(
        f"{stack.uri}/#/experiments/{info.experiment_id}/runs/{info.run_id}",
        login=f"{stack.user}:{stack.password}",
    )
    shown = browser.shown(words)

    assert [word for word in words if word not in shown] == []


def test_the_report_can_be_read_in_mlflows_own_viewer(stack, runs, stored, browser):
    info = stored(runs["proxied"].folder).run.info
    words = ("The run", "verifiable.success_ratio", "verifiable.language_models")

    browser.open(
        f"{stack.uri}/#/experiments/{info.experiment_id}/runs/{info.run_id}/artifacts/report.html",
        login=f"{stack.user}:{stack.password}",
    )
    shown = browser.shown_in_frame("blob", words)

    assert [word for word in words if word not in shown] == []
