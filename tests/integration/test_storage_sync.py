"""`storage sync` against a real S3 server: uploads once, goes on with half, and the run says how it went."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stack as servers
from weighted_mtp_core.builtin.mlflow import MlflowOptions, build_mlflow
from weighted_mtp_core.cli import main
from weighted_mtp_core.tracking import sync as module

pytestmark = pytest.mark.slow


@pytest.fixture
def storage(tmp_path):
    for name, megabytes in (("small", 1), ("large", 30)):
        source = tmp_path / name
        source.mkdir()
        (source / "weights.bin").write_bytes(os.urandom(megabytes * 1_000_000))
        (source / "config.json").write_text("{}")
        main(["storage", "add-model", name, "1", str(source)])
    return tmp_path / "storage"


@pytest.fixture
def to(tmp_path):
    return f"s3://{servers.BUCKET}/{tmp_path.name}"


@pytest.fixture
def objects(stack, to):
    """Key, ETag and time of everything below the target."""
    prefix = to.removeprefix(f"s3://{servers.BUCKET}/") + "/"

    def objects():
        found = stack.s3_client().list_objects_v2(Bucket=servers.BUCKET, Prefix=prefix).get("Contents", [])
        return {each["Key"].removeprefix(prefix): (each["ETag"], each["LastModified"]) for each in found}

    return objects


@pytest.fixture
def run(open_recorder, monkeypatch):
    """The folder of a finished run that the server has."""
    with open_recorder() as record:
        pass
    monkeypatch.setattr(module, "make_plan", lambda _: None)
    monkeypatch.setattr(
        module, "build_trackers", lambda _: {"0-core.mlflow": build_mlflow(MlflowOptions(), None)}
    )
    return record.folder.path


def sync(to, *more):
    return main(["storage", "sync", "--to", to, *more])


def test_twice_uploads_once(storage, to, objects, capsys):
    assert sync(to, "--dry-run") == 0
    before = objects()
    assert sync(to) == 0
    first = objects()
    assert sync(to) == 0

    assert before == {}
    assert set(first) == {
        f"models_v2/{name}/1/{file}"
        for name in ("small", "large")
        for file in ("weights.bin", "config.json", "manifest.json")
    }
    assert objects() == first
    assert "6 files are there, 0 are new (0 bytes)" in capsys.readouterr().out


def test_what_was_uploaded_has_every_byte(stack, storage, to):
    sync(to)

    key = to.removeprefix(f"s3://{servers.BUCKET}/") + "/models_v2/large/1/weights.bin"
    stored = stack.s3_client().get_object(Bucket=servers.BUCKET, Key=key)["Body"].read()
    assert stored == (storage / "models_v2/large/1/weights.bin").read_bytes()


def test_killed_half_way_it_goes_on(storage, to, objects):
    process = subprocess.Popen([sys.executable, "-m", "weighted_mtp_core", "storage", "sync", "--to", to])
    end = time.monotonic() + 30
    while not objects() and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()

    assert sync(to) == 0

    assert len(objects()) == 6


def test_success_is_a_tag_on_the_run(storage, to, run, stored):
    assert sync(to, "--run", str(run)) == 0

    kept = stored(run)
    assert kept.run.data.tags["storage_sync"] == "True"
    assert kept.status == "FINISHED"


def test_a_failure_makes_the_run_failed(stack, storage, to, run, stored):
    (storage / "models_v2/small/1/weights.bin").write_bytes(b"changed")

    assert sync(to, "--run", str(run)) != 0

    kept = stored(run)
    assert kept.run.data.tags["storage_sync"] == "False"
    assert kept.status == "FAILED"


def test_the_script_does_the_same(storage, to, objects):
    script = Path(__file__).parents[2] / "scripts" / "sync_to_vessl_storage.py"

    subprocess.run([sys.executable, script, "--to", to], check=True)

    assert len(objects()) == 6
