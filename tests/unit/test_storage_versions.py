"""Versions of models and data sets are added once, verified by checksum, and never change."""

import pytest
from weighted_mtp_core.cli import main
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.storage.versions import add_version, versions


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "download"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "weights.bin").write_bytes(b"\0" * 1000)
    return folder


@pytest.fixture
def storage(tmp_path):
    return tmp_path / "storage"


def add(storage, source, version="1"):
    return add_version(storage, source, kind="models_v2", name="tiny", version=version)


def test_a_version_is_a_copy_with_a_manifest(storage, model):
    added = add(storage, model)

    assert added.address == "models_v2/tiny/1"
    assert (added.path / "deep" / "weights.bin").read_bytes() == b"\0" * 1000
    assert list(versions(storage)) == [added]


def test_one_file_is_a_version_too(storage, model):
    added = add(storage, model / "config.json")

    assert (added.path / "config.json").read_text() == "{}"


def test_a_version_is_not_overwritten(storage, model):
    add(storage, model)

    with pytest.raises(WmtpError, match="exists already, and a version never changes"):
        add(storage, model)


@pytest.mark.parametrize("version", ["../1", "", ".hidden"])
def test_a_version_that_is_no_folder_name_is_refused(storage, model, version):
    with pytest.raises(WmtpError, match="must match"):
        add(storage, model, version)

    assert not storage.exists()


def test_a_missing_source_is_an_error(storage, tmp_path):
    with pytest.raises(WmtpError, match=r"there is no `.*nothing` to add"):
        add(storage, tmp_path / "nothing")


def test_verify_names_a_changed_byte(storage, model, capsys):
    main(["storage", "add-model", "tiny", "1", str(model), "--storage", str(storage)])
    main(["storage", "add-dataset", "lines", "2", str(model), "--storage", str(storage)])
    weights = storage / "models_v2" / "tiny" / "1" / "deep" / "weights.bin"
    weights.write_bytes(b"\1" + b"\0" * 999)
    capsys.readouterr()

    code = main(["storage", "verify", "--storage", str(storage)])

    shown = capsys.readouterr().out
    assert code == 1
    assert f"FAILED  models_v2/tiny/1     `{weights}` changed" in shown
    assert "ok      datasets_v2/lines/2  sha256 " in shown


def test_syncing_an_empty_storage_says_how_to_add(storage, capsys):
    code = main(["storage", "sync", "--to", "s3://bucket/x", "--storage", str(storage)])

    assert code == 2
    assert "hint: add one: python -m weighted_mtp_core storage add-model" in capsys.readouterr().err


def test_a_target_that_is_not_s3_is_refused(storage, capsys):
    assert main(["storage", "sync", "--to", "/tmp/x", "--storage", str(storage)]) == 2
    assert "error: `/tmp/x` is no S3 location" in capsys.readouterr().err
