"""`core.mlflow` on real stores: sqlite and `file:`, read back through MLflow's own client."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from weighted_mtp_core.api import BuildContext, DatasetVersion, MetricPoint, RunInfo, RunOutcome, WmtpError
from weighted_mtp_core.builtin._mlflow_uri import local_path
from weighted_mtp_core.builtin.mlflow import MlflowOptions, build_mlflow
from weighted_mtp_core.tracking.noop import NoopTracker

EXPERIMENT = "weighted_mtp/flat"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def storage(tmp_path_factory):
    """A shared storage root: creating an sqlite store takes seconds."""
    return tmp_path_factory.mktemp("storage")


def build(storage, **options):
    return build_mlflow(MlflowOptions(**options), BuildContext(seed=0, storage=storage))


@pytest.fixture(params=["sqlite", "file"])
def tracker(request, storage):
    uri = None if request.param == "sqlite" else f"file://{storage / 'filestore'}"
    return build(storage, tracking_uri=uri)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def make_run(folder, **changes):
    values = {
        "run_id": f"id-{folder.name}",
        "name": "first",
        "experiment": EXPERIMENT,
        "params": {"train.steps": "3"},
        "tags": {"algo": "flat"},
        "datasets": (DatasetVersion(name="micro", version="2", sha256="a1" * 32),),
        "folder": folder,
        "started_ms": 1_700_000_000_000,
    }
    return RunInfo(**(values | changes))


def stored(tracker, experiment=EXPERIMENT):
    """The client of the tracker's store, and the run that it reads back."""
    from mlflow import MlflowClient

    client = MlflowClient(tracker.uri)
    return client, client.get_run(tracker.run_id)


def history(tracker, name):
    client, run = stored(tracker)
    return [
        (point.step, point.value, point.timestamp)
        for point in client.get_metric_history(run.info.run_id, name)
    ]


def points(*steps, name="loss", time_ms=1_700_000_000_500):
    return [MetricPoint(name=name, value=step / 2, step=step, time_ms=time_ms + step) for step in steps]


def test_a_whole_run_is_read_back(tracker, run, tmp_path):
    log = tmp_path / "training.log"
    log.write_text("said")
    tracker.start(run)
    tracker.log_metrics(points(1, 2))
    tracker.set_tags({"model_version": "micro"})
    tracker.log_artifact(log, "logs")
    tracker.finish(RunOutcome.FINISHED, time_ms=1_700_000_009_000)

    client, kept = stored(tracker)

    assert client.get_experiment(kept.info.experiment_id).name == EXPERIMENT
    assert kept.info.run_name == "first"
    assert (kept.info.status, kept.info.start_time, kept.info.end_time) == (
        "FINISHED",
        1_700_000_000_000,
        1_700_000_009_000,
    )
    assert kept.data.params == {"train.steps": "3"}
    assert {
        "algo": "flat",
        "model_version": "micro",
        "wmtp.run_id": run.run_id,
    }.items() <= kept.data.tags.items()
    assert history(tracker, "loss") == [(1, 0.5, 1_700_000_000_501), (2, 1.0, 1_700_000_000_502)]
    assert [file.path for file in client.list_artifacts(kept.info.run_id, "logs")] == ["logs/training.log"]


def test_data_are_a_dataset_input(tracker, run):
    tracker.start(run)

    (dataset_input,) = stored(tracker)[1].inputs.dataset_inputs

    assert dataset_input.dataset.name == "micro"
    assert dataset_input.dataset.digest == ("a1" * 32)[:36]
    assert "a1" * 32 in dataset_input.dataset.source


def test_points_that_the_store_has_are_not_doubled_even_with_another_time(tracker, run):
    tracker.start(run)
    tracker.log_metrics(points(1, 2))
    resumed = type(tracker)(uri=tracker.uri, artifact_root=None)
    resumed.start(run)

    resumed.log_metrics(points(1, 2, 3, time_ms=1_800_000_000_000))

    assert resumed.run_id == tracker.run_id
    assert [step for step, _, _ in history(tracker, "loss")] == [1, 2, 3]


def test_starting_again_adds_what_became_known_and_changes_no_param(tracker, run, tmp_path):
    tracker.start(run)

    tracker.start(
        make_run(tmp_path, params={"train.steps": "9", "data.version": "2"}, tags={"algo": "other"})
    )

    _, kept = stored(tracker)
    assert kept.data.params == {"train.steps": "3", "data.version": "2"}
    assert kept.data.tags["algo"] == "other"


def test_a_run_that_goes_on_is_running_again(tracker, run):
    tracker.start(run)
    tracker.finish(RunOutcome.KILLED)

    tracker.start(run)

    assert stored(tracker)[1].info.status == "RUNNING"


def test_awkward_params_are_all_stored(tracker, tmp_path):
    params = {f"table.{i}": str(i) for i in range(250)}
    params |= {
        "a[0]=@%": "brackets",
        "a[0]=@!": "clash",
        "nul": "a\0b",
        "emoji": "\N{ROCKET}" * 20_000,
        "": "x",
    }
    params["/lead//../up"] = "path"

    tracker.start(make_run(tmp_path, params=params))

    kept = stored(tracker)[1].data.params
    assert len(kept) == len(params)
    assert {"brackets", "clash", "a\N{REPLACEMENT CHARACTER}b", "path"} <= set(kept.values())
    assert kept["emoji"].startswith("\N{ROCKET}" * 100)
    assert "[cut: 20000 characters, " in kept["emoji"]


def test_a_deleted_experiment_says_how_to_restore_it(storage, tmp_path):
    from mlflow import MlflowClient

    tracker = build(storage)
    tracker.start(make_run(tmp_path, experiment="weighted_mtp/deleted"))
    MlflowClient(tracker.uri).delete_experiment(tracker._experiment_id)

    with pytest.raises(WmtpError, match="the experiment `weighted_mtp/deleted` was deleted") as error:
        build(storage).start(make_run(tmp_path, experiment="weighted_mtp/deleted"))

    assert f"mlflow experiments restore --experiment-id {tracker._experiment_id}" in error.value.hint


def test_a_name_that_is_no_path_is_refused_before_anything_is_created(storage, tmp_path):
    with pytest.raises(WmtpError, match="is not a valid name for an experiment"):
        build(storage).start(make_run(tmp_path, experiment="../../evil"))


@pytest.mark.parametrize(
    ("uri", "shown", "hint"),
    [
        (
            "https://ann:pw1@host/x",
            "`https://***@host/x` holds a user or a password",
            "MLFLOW_TRACKING_PASSWORD",
        ),
        ("https://token@host", "`https://***@host` holds a user or a password", "MLFLOW_TRACKING_PASSWORD"),
        ("postgresql+psycopg2://u:pw1@h/db", "holds a user or a password", "PGPASSWORD"),
        ("./mlruns", "`./mlruns` is not a tracking URI", "sqlite:///"),
        ("databricks", "is not a tracking URI", "https://"),
    ],
)
def test_uris_that_leak_or_mislead_are_refused(storage, monkeypatch, uri, shown, hint):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    with pytest.raises(WmtpError) as error:
        build(storage)

    assert shown in str(error.value)
    assert "pw1" not in str(error.value)
    assert hint in error.value.hint


def test_a_password_in_the_option_is_refused_with_the_recipe():
    with pytest.raises(ValueError, match="holds a user or a password"):
        MlflowOptions(tracking_uri="https://ann:pw1@host")


def test_the_option_wins_over_the_environment_which_wins_over_dotenv(storage, monkeypatch, tmp_path):
    (tmp_path / ".env").write_text(f"MLFLOW_TRACKING_URI=sqlite:///{tmp_path}/dotenv.db\n")
    from_dotenv = build(storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/environment.db")
    from_environment = build(storage)
    from_option = build(storage, tracking_uri=f"sqlite:///{tmp_path}/option.db")

    stores = [tracker.uri.rsplit("/", 1)[1] for tracker in (from_dotenv, from_environment, from_option)]

    assert stores == ["dotenv.db", "environment.db", "option.db"]


def test_nothing_configured_means_a_store_below_the_storage_root(storage, run):
    tracker = build(storage)
    tracker.start(run)

    assert tracker.where().endswith(f"python -m mlflow ui --backend-store-uri sqlite:///{storage}/mlflow.db")
    assert stored(tracker)[1].info.artifact_uri.startswith(f"file://{storage}/mlartifacts/{EXPERIMENT}/")
    assert not Path("mlruns").exists()


@pytest.mark.parametrize("name", ["q?x=1", "a b", "50%41", "#1", "~", "모델", "it's", "a&b;c"])
def test_a_working_folder_may_have_any_name(name, storage, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    folder = tmp_path / name
    kept = f"storage{ord(name[0])}"  # MLflow keeps one engine for a relative URI, in all working folders
    (folder / kept).mkdir(parents=True)
    run = make_run(folder, experiment="weighted_mtp/named", run_id="named")
    build(storage).start(make_run(tmp_path, run_id="template"))
    shutil.copy(storage / "mlflow.db", folder / kept)  # creating an sqlite store takes seconds
    (folder / "report.md").write_text("it is here")
    monkeypatch.chdir(folder)

    tracker = build(Path(kept))
    tracker.start(run)
    tracker.log_artifact(folder / "report.md", "")
    *_, option, uri = shlex.split(tracker.where())

    client = MlflowClient(uri)
    assert option == "--backend-store-uri"
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["report.md"]
    assert sorted(each.name for each in Path(kept).iterdir()) == [
        "mlartifacts",
        "mlflow.db",
        "mlflow.db.lock",
    ]
    assert list(tmp_path.iterdir()) == [folder]
    assert sorted(each.name for each in folder.iterdir()) == ["report.md", kept]


def test_a_storage_that_no_uri_can_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(WmtpError, match=r"`what\?` has `\?`, `#` or `%` in its name"):
        build(Path("what?"))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("sqlite://", "is a database in memory"),
        ("sqlite:///", "is a database in memory"),
        ("sqlite:///:memory:", "is a database in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "is a database in memory"),
        ("sqlite:///~/x.db", "begins with `~`, which is not expanded"),
        ("sqlite:////~/x.db", "begins with `~`, which is not expanded"),
        ("file:///~/x", "begins with `~`, which is not expanded"),
        ("file://~/x", "begins with `~`, which is not expanded"),
        ("file://tmp/x", "does not name a file"),
        ("sqlite://tmp/x.db", "does not name a file"),
        ("sqlite:////tmp/50%41/x.db", "does not name a file"),
    ],
)
def test_a_uri_that_names_no_file_is_refused(storage, tmp_path, monkeypatch, uri, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    with pytest.raises(WmtpError, match=message):
        build(storage)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////a b/x.db?timeout=30", "/a b/x.db"),
        ("file:///a%20b/x", "/a b/x"),
        ("file://localhost/a", "/a"),
        ("https://host/a", None),
    ],
)
def test_the_path_of_a_uri(uri, path):
    assert local_path(uri) == (path and Path(path))


def test_the_file_store_is_allowed_for_the_user_and_the_command_says_how(storage, run):
    tracker = build(storage, tracking_uri=f"file://{storage}/filestore")
    tracker.start(run)

    assert tracker.where().startswith("MLFLOW_ALLOW_FILE_STORE=true ")
    assert "python -m mlflow ui --backend-store-uri file:///" in tracker.where()


def test_an_artifact_root_of_ones_own(storage, tmp_path):
    tracker = build(storage, artifact_root=f"file://{tmp_path}/files")
    tracker.start(make_run(tmp_path, experiment="weighted_mtp/rooted"))

    assert stored(tracker)[1].info.artifact_uri.startswith(f"file://{tmp_path}/files/weighted_mtp/rooted/")


def test_disabled_means_untracked(storage):
    assert isinstance(build(storage, enabled=False), NoopTracker)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:9", "nothing answers at the tracking server `http://127.0.0.1:9`"),
        (
            "http://no-such-host.invalid",
            "the host of the tracking server `http://no-such-host.invalid` is not known",
        ),
    ],
)
def test_a_server_that_is_not_there_stops_the_run_at_once(storage, run, uri, message):
    with pytest.raises(WmtpError) as error:
        build(storage, tracking_uri=uri).start(run)

    assert str(error.value) == message


SEVERAL = """
    import sys
    from pathlib import Path
    from weighted_mtp_core.api import BuildContext, MetricPoint, RunInfo, RunOutcome
    from weighted_mtp_core.builtin.mlflow import MlflowOptions, build_mlflow

    tracker = build_mlflow(MlflowOptions(), BuildContext(seed=0, storage=Path(sys.argv[1])))
    tracker.start(RunInfo(
        run_id=sys.argv[2], name="r", experiment="new/one", params={"a": "1"}, tags={}, datasets=(),
        folder=Path(sys.argv[1]),
    ))
    tracker.log_metrics([MetricPoint(name="loss", value=1.0, step=1, time_ms=1)])
    tracker.finish(RunOutcome.FINISHED)
"""


@pytest.mark.slow
def test_several_processes_start_on_a_fresh_store_at_once(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", dedent(SEVERAL), tmp_path, f"run-{i}"], stderr=subprocess.PIPE
        )
        for i in range(4)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiments = [each for each in client.search_experiments() if each.name == "new/one"]
    runs = client.search_runs([each.experiment_id for each in experiments])

    assert [process.returncode for process in processes] == [0] * 4, errors
    assert len(experiments) == 1
    assert [run.info.status for run in runs] == ["FINISHED"] * 4


def test_a_killed_process_that_was_creating_the_store_is_no_obstacle(tmp_path, run):
    (tmp_path / "mlflow.db.new").write_bytes(b"half a database")
    tracker = build(tmp_path)

    tracker.start(run)

    assert stored(tracker)[1].info.status == "RUNNING"
    assert sorted(path.name for path in tmp_path.glob("mlflow.db*")) == ["mlflow.db", "mlflow.db.lock"]


def test_a_store_tells_that_a_run_was_deleted(tracker, tmp_path):
    tracker.start(make_run(tmp_path))
    tracker.log_metrics([MetricPoint(name="loss", value=1.0, step=3, time_ms=1)])
    before = tracker.kept()

    stored(tracker)[0].delete_run(tracker.run_id)

    assert (before.run, before.last_step) == (tracker.run_id, {"loss": 3})
    assert tracker.kept().run == ""
