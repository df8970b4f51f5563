"""Versions of models and data sets are added once, verified by checksum, and never change."""

import os
import re
from pathlib import Path

import pytest
from weighted_mtp_core.cli import main
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.storage.manifest import MANIFEST, atomic_folder, verify_manifest
from weighted_mtp_core.storage.verify_once import verify_once
from weighted_mtp_core.storage.versions import add_version, derived, versions


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

    with pytest.raises(WmtpError, match="already exists, and a version never changes"):
        add(storage, model)


@pytest.mark.parametrize("version", ["../1", "", ".hidden"])
def test_a_version_that_is_no_folder_name_is_refused(storage, model, version):
    with pytest.raises(WmtpError, match="must match"):
        add(storage, model, version)

    assert not storage.exists()


def test_a_missing_source_is_an_error(storage, tmp_path):
    with pytest.raises(WmtpError, match=r"`.*nothing` does not exist"):
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
    assert "error: `/tmp/x` is not an S3 location" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["manifest.json", "derived/tokens.jsonl", "derived"])
def test_a_file_that_core_would_replace_or_leave_out_is_refused_by_name(storage, model, name):
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text('{"mine": 1}')

    with pytest.raises(WmtpError, match=rf"{name.partition('/')[0]}` cannot be kept"):
        add(storage, model)

    assert not storage.exists()


def test_the_manifest_of_another_storage_is_written_again(storage, model, tmp_path):
    first = add(storage, model)

    second = add(tmp_path / "other", first.path)

    assert (second.path / MANIFEST).read_bytes() == (first.path / MANIFEST).read_bytes()


def test_a_manifest_below_the_top_is_a_file_like_any_other(storage, model):
    (model / "deep" / "manifest.json").write_text('{"shards": []}')

    added = add(storage, model)
    (added.path / "deep" / "manifest.json").write_text("{}")

    with pytest.raises(WmtpError, match=r"deep/manifest\.json` changed"):
        verify_manifest(added.path)


def test_files_behind_links_are_copied_and_a_link_to_nothing_is_named(storage, model, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "shard.bin").write_bytes(b"1")
    (model / "linked").symlink_to(elsewhere)

    added = add(storage, model)
    (model / "dangling").symlink_to("nowhere")

    assert (added.path / "linked" / "shard.bin").read_bytes() == b"1"
    assert not (added.path / "linked").is_symlink()
    with pytest.raises(WmtpError, match=r"cannot copy `.*/dangling`: "):
        add(storage, model, version="2")
    assert len(list(versions(storage))) == 1


@pytest.mark.parametrize("name", ["a b?.bin", "50%.bin", "#1.bin", "모델.bin", ".hidden", "~"])
def test_names_of_any_alphabet_are_kept_and_verified(storage, model, name):
    (model / name).write_bytes(b"1")

    added = add(storage, model)
    (added.path / name).write_bytes(b"2")

    with pytest.raises(WmtpError, match=re.escape(f"{name}` changed")):
        verify_manifest(added.path)


def test_a_name_that_is_not_utf8_is_refused(storage, model):
    Path(os.fsdecode(os.fsencode(model) + b"/gr\xfcn.bin")).write_bytes(b"1")

    with pytest.raises(WmtpError, match=r"gr\\xfcn\.bin` cannot be kept: its name is not UTF-8"):
        add(storage, model)


def test_a_single_file_whose_name_is_not_utf8_is_refused(storage, tmp_path):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn.bin"))
    file.write_bytes(b"1")

    with pytest.raises(WmtpError, match=r"gr\\xfcn\.bin` cannot be kept: its name is not UTF-8"):
        add(storage, file)


@pytest.mark.parametrize(("name", "version"), [("team/own", "1"), ("own", "1/a")])
def test_a_name_or_a_version_of_several_folders_is_refused_because_it_would_not_be_listed(
    storage, model, name, version
):
    with pytest.raises(WmtpError, match="is not a name and a version"):
        add_version(storage, model, kind="models_v2", name=name, version=version)

    assert list(versions(storage)) == []


def test_unfinished_derived_folders_are_not_verified(storage, model):
    added = add(storage, model)
    (added.path / "derived" / ".tokens.0123").mkdir(parents=True)

    assert derived(added) == []


def test_verify_speaks_of_every_file(storage, model, capsys):
    added = add(storage, model)
    with atomic_folder(added.path / "derived" / "tokens") as tokens:
        (tokens / "ids.npy").write_bytes(b"1")
    (added.path / "derived" / "tokens.lock").touch()
    loose = storage / "datasets_v2" / "lines" / "1" / "train.jsonl"
    loose.parent.mkdir(parents=True)
    loose.write_text("{}")
    verify_once(added.path)

    assert main(["storage", "verify", "--storage", str(storage)]) == 0
    whole = capsys.readouterr().out.splitlines()
    (added.path / "derived" / "tokens" / "ids.npy").write_bytes(b"2")
    (added.path / "derived" / "mine.txt").write_bytes(b"2")
    assert main(["storage", "verify", "--storage", str(storage)]) == 1
    broken = capsys.readouterr().out

    assert [line.split()[:2] for line in whole] == [
        ["ok", "models_v2/tiny/1"],
        ["ok", "models_v2/tiny/1/derived/tokens"],
        ["unknown", "datasets_v2/lines/1"],
    ]
    assert "FAILED   models_v2/tiny/1/derived/tokens" in broken
    assert "unknown  models_v2/tiny/1                 1 files" in broken
