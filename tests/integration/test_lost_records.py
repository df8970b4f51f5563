"""MLflow gets all data of the journal again after a change of store, a deleted run or a restored database."""

import sqlite3
from contextlib import closing

import pytest
from recording import wait_until
from weighted_mtp_core.cli import main

pytestmark = pytest.mark.slow

NAMES = [f"m{i}" for i in range(5)]


class Sqlite:
    """A local database."""

    def __init__(self, folder):
        self.path, self.copy = folder / "local.db", folder / "copy.db"
        self.uri = f"sqlite:///{self.path}"

    def back_up(self):
        with closing(sqlite3.connect(self.path)) as live, closing(sqlite3.connect(self.copy)) as copy:
            live.backup(copy)

    def restore(self):
        with closing(sqlite3.connect(self.path)) as live, closing(sqlite3.connect(self.copy)) as copy:
            copy.backup(live)


class Server:
    """nginx, MLflow, PostgreSQL and S3; the copy is a dump of the database."""

    def __init__(self, stack, folder):
        self.stack, self.uri, self.copy = stack, stack.uri, folder / "copy.dump"

    def back_up(self):
        self.stack.dump_database(self.copy)

    def restore(self):
        self.stack.restore_database(self.copy)


@pytest.fixture(params=["server", "sqlite"])
def place(request, stack, tmp_path, monkeypatch):
    """Where the run is recorded."""
    place = Server(stack, tmp_path) if request.param == "server" else Sqlite(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.uri)
    return place


@pytest.fixture
def record(open_recorder):
    """A run with a file, whose steps are recorded with `steps`."""
    record = open_recorder()
    (record.folder.checkpoints / "best_model.pt").write_bytes(b"weights" * 100_000)
    record.artifact(record.folder.checkpoints / "best_model.pt", "checkpoints")
    return record


def steps(record, first, last):
    for step in range(first, last + 1):
        record.metrics("policy", step, {name: step / (i + 1) for i, name in enumerate(NAMES)})
        record.timings("policy", step, {"tokens_per_second": 1e4 + step})


def wait_for_step(stored, record, step):
    folder = record.folder.path
    wait_until(lambda: stored(folder).run.data.metrics.get("tokens_per_second") == 1e4 + step)


def assert_whole(stored, record):
    run = stored(record.folder.path)
    assert run.status == "FINISHED"
    assert run.points() == run.journalled()
    assert {step for _, step, _, _ in run.points()} == set(range(1, 61))
    assert run.file("recipe.toml") == record.folder.recipe.read_bytes()
    assert run.file("logs/training.log") == record.folder.log.read_bytes()
    assert run.file("checkpoints/best_model.pt") == b"weights" * 100_000
    assert run.run.data.params["train.steps"] == "3"
    assert run.run.data.tags["algo"] == "flat"


def sync(record):
    return main(["track", "sync", str(record.folder.path)])


def test_a_database_that_is_restored_from_a_copy_of_mid_run_gets_the_rest_again(
    place, record, stored, capsys
):
    with record:
        steps(record, 1, 20)
        wait_for_step(stored, record, 20)
        place.back_up()
        steps(record, 21, 60)
    place.restore()
    before = stored(record.folder.path)

    assert sync(record) == 0

    assert (before.status, before.run.data.metrics["m0"]) == ("RUNNING", 20)
    assert "has lost steps of 6 metrics" in capsys.readouterr().out
    assert_whole(stored, record)


def test_a_database_that_is_restored_while_the_run_goes_on_gets_the_rest_again(place, record, stored):
    with record:
        steps(record, 1, 20)
        wait_for_step(stored, record, 20)
        place.back_up()
        steps(record, 21, 40)
        wait_for_step(stored, record, 40)
        place.restore()
        steps(record, 41, 60)

    assert_whole(stored, record)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_run_that_is_deleted_is_sent_anew(place, record, stored, goes_on):
    with record:
        steps(record, 1, 40)
        wait_for_step(stored, record, 40)
        deleted = stored(record.folder.path)
        if goes_on:
            deleted.client.delete_run(deleted.run.info.run_id)
        steps(record, 41, 60)
    if not goes_on:
        deleted.client.delete_run(deleted.run.info.run_id)
        assert sync(record) == 0

    assert stored(record.folder.path).run.info.run_id != deleted.run.info.run_id
    assert_whole(stored, record)


@pytest.fixture
def elsewhere(place, stack, tmp_path):
    """The URI of another store than that of `place`."""
    return stack.uri if isinstance(place, Sqlite) else f"sqlite:///{tmp_path}/other.db"


def test_another_store_gets_the_whole_run(place, elsewhere, record, stored, monkeypatch):
    with record:
        steps(record, 1, 60)
    assert_whole(stored, record)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)

    assert sync(record) == 0

    assert_whole(stored, record)
