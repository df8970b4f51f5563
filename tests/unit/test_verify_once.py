"""Large folders are hashed once, and again after a change."""

import pytest
from weighted_mtp_core.api import WmtpError
from weighted_mtp_core.storage import verify_once as module
from weighted_mtp_core.storage.manifest import DERIVED, verify_manifest, write_manifest
from weighted_mtp_core.storage.verify_once import verify_once


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.bin").write_bytes(bytes(range(256)))
    write_manifest(tmp_path / "data")
    return tmp_path / "data"


def test_the_sum_is_that_of_the_manifest_each_time(folder):
    assert [verify_once(folder), verify_once(folder)] == [verify_manifest(folder)] * 2


def test_an_untouched_folder_is_hashed_once(folder, monkeypatch):
    verify_once(folder)
    monkeypatch.setattr(module, "verify_manifest", None)

    assert verify_once(folder)


def test_a_file_written_to_after_it_was_found_right_is_hashed_again(folder):
    verify_once(folder)
    with (folder / "a.bin").open("r+b") as file:
        file.write(b"\x01")

    with pytest.raises(WmtpError, match=r"a\.bin` changed since it was written"):
        verify_once(folder)


@pytest.mark.parametrize("name", ["a.bin", "manifest.json"])
def test_a_file_that_is_gone_is_missed(folder, name):
    verify_once(folder)
    (folder / name).unlink()

    with pytest.raises(WmtpError):
        verify_once(folder)


def test_what_is_derived_from_a_folder_is_not_among_its_files(folder):
    before = verify_manifest(folder)
    (folder / DERIVED / "more").mkdir(parents=True)
    (folder / DERIVED / "more" / "b.bin").write_bytes(b"b")

    assert verify_manifest(folder) == before == write_manifest(folder)
