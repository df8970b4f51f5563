"""`storage sync` with a real S3 server: it uploads once, resumes an interrupted upload, and tags the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import stack as servers
from recording import wait_until
from weighted_mtp_core.cli import main
from weighted_mtp_core.storage.s3 import etag

pytestmark = pytest.mark.slow


@pytest.fixture
def storage(tmp_path):
    for name, megabytes in (("small", 1), ("large", 60)):
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
    """Key, ETag and time of all objects below the target."""
    prefix = to.removeprefix(f"s3://{servers.BUCKET}/") + "/"

    def objects():
        found = stack.s3_client().list_objects_v2(Bucket=servers.BUCKET, Prefix=prefix).get("Contents", [])
        return {each["Key"].removeprefix(prefix): (each["ETag"], each["LastModified"]) for each in found}

    return objects


@pytest.fixture
def run(open_recorder):
    """The folder of a finished run that the server has."""
    with open_recorder() as record:
        pass
    return record.folder.path


@pytest.fixture
def syncing(storage, to, objects, wmtp):
    """Start a sync; return its process half-way, and a function that compares S3 with the local files."""

    def whole():
        return {key: tag.strip('"') for key, (tag, _) in objects().items()} == {
            path.relative_to(storage).as_posix(): etag(path) for path in storage.glob("models_v2/*/1/*")
        }

    def syncing(*options):
        process = wmtp("storage", "sync", "--to", to, *options, cwd=storage.parent)
        wait_until(objects)
        return process, whole

    return syncing


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


def test_killed_half_way_it_goes_on(syncing, to):
    process, whole = syncing()
    process.kill()
    process.wait()
    half = whole()

    assert sync(to) == 0

    assert not half
    assert whole()


def test_success_is_a_tag_on_the_run(storage, to, run, stored):
    assert sync(to, "--run", str(run)) == 0

    kept = stored(run)
    assert kept.run.data.tags["storage_sync"] == "True"
    assert kept.status == "FINISHED"


def test_s3_killed_half_way_makes_the_run_failed_and_syncing_again_goes_on(stack, syncing, to, run, stored):
    process, whole = syncing("--run", run)
    stack.s3.kill()
    _, stderr = process.communicate(timeout=100)
    failed = stored(run)
    stack.s3.start()
    half = whole()

    assert sync(to, "--run", str(run)) == 0

    assert process.returncode == 1
    assert "hint: run the same command again: it continues with the missing files" in stderr
    assert (failed.status, failed.run.data.tags["storage_sync"]) == ("FAILED", "False")
    assert not half
    assert whole()
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
