"""The journal: one JSON object with a checksum per line, complete or absent."""

import json
import resource
import subprocess
import sys
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.tracking.journal import (
    Damage,
    Entry,
    Journal,
    decode,
    encode,
    plain_number,
    read_journal,
)

FIELDS = {"step": 10, "stage": "policy", "metrics": {"policy_loss": 1.25}}
names = st.text(max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    yield journal
    journal.close()


def test_a_line_is_one_json_object_with_kind_fields_and_time():
    line = json.loads(encode("metrics", FIELDS, time_ms=1_763_900_336_007))

    assert {**FIELDS, "kind": "metrics", "time": 1763900336.007}.items() <= line.items()


def test_lines_of_two_runs_differ_in_time_only():
    first = json.loads(encode("metrics", FIELDS, time_ms=1))
    second = json.loads(encode("metrics", FIELDS, time_ms=2_000_000))

    assert {**first, "time": None} == {**second, "time": None}


@given(names, st.dictionaries(names, st.one_of(numbers, names)), st.integers(0, 2**42))
def test_what_was_written_is_what_is_read(kind, fields, time_ms):
    fields = {"fields": fields}

    entry = decode(encode(kind, fields, time_ms=time_ms), start=7)

    assert isinstance(entry, Entry)
    assert (entry.kind, entry.fields, entry.time_ms, entry.start) == (kind, fields, time_ms, 7)


@given(st.integers(0, 7), st.data())
def test_a_flipped_bit_outside_the_time_is_damage(bit, data):
    line = bytearray(encode("metrics", FIELDS, time_ms=1_763_900_336_007))
    protected = [i for i in range(len(line) - 1) if i < line.find(b',"time"') or i > line.find(b',"crc"')]
    line[data.draw(st.sampled_from(protected))] ^= 1 << bit

    assert isinstance(decode(bytes(line), start=0), Damage)


def test_reading_goes_on_behind_a_damaged_line(journal):
    for step in range(3):
        journal.append("metrics", {"step": step})
    content = journal.path.read_bytes().replace(b'"step":1', b'"step":7')
    journal.path.write_bytes(content)

    kinds = [type(entry) for entry in read_journal(journal.path)]

    assert kinds == [Entry, Damage, Entry]


def test_a_line_that_is_still_being_written_is_not_read(journal):
    journal.append("metrics", {"step": 1})
    with journal.path.open("ab") as file:
        file.write(b'{"kind":"metr')

    assert len(list(read_journal(journal.path))) == 1


def test_opening_again_cuts_off_what_a_killed_process_left_half_written(journal):
    journal.append("metrics", {"step": 1})
    with journal.path.open("ab") as file:
        file.write(b'{"kind":"metr')

    again = Journal(journal.path)
    again.append("metrics", {"step": 2})

    assert [entry.fields["step"] for entry in read_journal(journal.path)] == [1, 2]


def test_only_lines_of_the_wanted_kinds_are_read(journal):
    for kind in ("run", "metrics", "params"):
        journal.append(kind, {})

    assert [entry.kind for entry in read_journal(journal.path, kinds=("params", "run"))] == ["run", "params"]


@pytest.mark.parametrize(
    ("value", "written"), [(1.5, 1.5), (float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")]
)
def test_values_that_json_cannot_hold_are_written_as_words(value, written):
    assert plain_number(value) == written


def test_a_full_disk_is_an_error_and_leaves_whole_lines(journal):
    journal.append("metrics", {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 10, hard))
    try:
        with pytest.raises(RunFailedError, match="cannot write the journal"):
            journal.append("metrics", {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert [entry.fields["step"] for entry in read_journal(journal.path)] == [1]


def test_what_append_returned_from_survives_a_kill(tmp_path):
    program = """
        import os, signal, sys
        from pathlib import Path
        from weighted_mtp_core.tracking.journal import Journal
        journal = Journal(Path(sys.argv[1]))
        for step in range(100):
            journal.append("metrics", {"step": step})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    path = tmp_path / "metrics.jsonl"

    subprocess.run([sys.executable, "-c", dedent(program), path], check=False)

    assert [entry.fields["step"] for entry in read_journal(path)] == list(range(100))
