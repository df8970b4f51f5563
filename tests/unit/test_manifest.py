"""Files are written atomically and verified against their manifest."""

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from weighted_mtp_core.api import WmtpError
from weighted_mtp_core.storage.atomic import atomic_write, unfinished_folder
from weighted_mtp_core.storage.manifest import atomic_folder, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "a.txt").write_text("one")
    (tmp_path / "data" / "deep" / "b.bin").write_bytes(bytes(range(256)))
    write_manifest(tmp_path / "data")
    return tmp_path / "data"


def test_an_untouched_folder_verifies_to_the_sum_it_was_written_with(folder):
    assert verify_manifest(folder) == write_manifest(folder)


def test_a_flipped_bit_is_named_with_its_file(folder):
    path = folder / "deep" / "b.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)

    with pytest.raises(WmtpError) as caught:
        verify_manifest(folder)

    assert str(caught.value) == f"`{path}` changed since it was written: its SHA-256 differs"
    assert caught.value.hint == f"restore the file, or delete `{folder}` if it can be created again"


def test_a_missing_file_is_named(folder):
    (folder / "a.txt").unlink()

    with pytest.raises(WmtpError, match=r"a\.txt` is missing"):
        verify_manifest(folder)


def test_an_added_file_is_named(folder):
    (folder / "c.txt").write_text("new")

    with pytest.raises(WmtpError, match=r"c\.txt` is not in the manifest"):
        verify_manifest(folder)


def test_a_folder_without_manifest_does_not_verify(tmp_path):
    with pytest.raises(WmtpError, match=r"has no `manifest\.json`"):
        verify_manifest(tmp_path)


def test_a_broken_manifest_does_not_verify(folder):
    (folder / "manifest.json").write_text("{")

    with pytest.raises(WmtpError, match="cannot be read"):
        verify_manifest(folder)


def test_any_changed_byte_moves_the_folders_sum(folder):
    before = verify_manifest(folder)
    (folder / "a.txt").write_text("two")

    assert write_manifest(folder) != before


def test_a_failed_write_leaves_the_old_contents_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")

    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def break_off_halfway():
        with atomic_folder(tmp_path / "made") as temporary:
            (temporary / "first").write_text("1")
            raise ValueError("halfway")

    with pytest.raises(ValueError, match="halfway"):
        break_off_halfway()

    assert list(tmp_path.iterdir()) == []

    with atomic_folder(tmp_path / "made") as temporary:
        (temporary / "first").write_text("1")
    verify_manifest(tmp_path / "made")

    assert (tmp_path / "made" / "first").read_text() == "1"


def test_of_two_that_make_a_folder_the_first_stays(tmp_path):
    with atomic_folder(tmp_path / "made") as slower:
        (slower / "x").write_text("slower")
        with atomic_folder(tmp_path / "made") as faster:
            (faster / "x").write_text("faster")

    assert (tmp_path / "made" / "x").read_text() == "faster"
    assert [one.name for one in tmp_path.iterdir()] == ["made"]


def test_a_linked_file_that_changed_in_place_is_summed_anew(tmp_path):
    best, snapshot = tmp_path / "best.pt", tmp_path / "snapshot"
    best.write_bytes(b"old")
    snapshot.mkdir()
    os.link(best, snapshot / "best.pt")
    first = write_manifest(snapshot)
    assert write_manifest(snapshot) == first

    best.write_bytes(b"new and longer")

    assert write_manifest(snapshot) != first
    verify_manifest(snapshot)


def test_the_next_process_deletes_the_folders_that_killed_ones_left_unfinished(tmp_path):
    (tmp_path / ".made.01234567" / "deep").mkdir(parents=True)
    (tmp_path / ".made.01234567" / "deep" / "file").write_text("half")
    (tmp_path / ".mad.01234567").mkdir()

    with unfinished_folder(tmp_path / "made") as running, unfinished_folder(tmp_path / "made") as other:
        (running / "file").write_text("half")
        found = {path.name for path in tmp_path.iterdir()}
    left = [path.name for path in tmp_path.iterdir()]

    assert found == {running.name, other.name, ".mad.01234567"}
    assert left == [".mad.01234567"]


def test_the_next_write_deletes_the_files_that_killed_ones_left_unfinished(tmp_path):
    for name in (".file.01234567", ".file.89abcdef", ".file.swp", ".files.01234567"):
        (tmp_path / name).write_text("half")

    with (tmp_path / ".file.89abcdef").open() as in_use:
        fcntl.flock(in_use, fcntl.LOCK_EX)
        atomic_write(tmp_path / "file", "new")

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".file.89abcdef",  # its process is alive
        ".file.swp",
        ".files.01234567",
        "file",
    ]


def test_processes_that_write_a_file_at_the_same_time_all_succeed(tmp_path):
    path = tmp_path / "file"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: atomic_write(path, f"{number}" * 1000), range(200)))

    assert path.read_text() in {f"{number}" * 1000 for number in range(200)}
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
