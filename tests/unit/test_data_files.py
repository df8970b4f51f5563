"""Rows from parquet, several files, folders of `datasets`, and copies of data sets on the hub."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
from pyarrow import Table, ipc, parquet
from weighted_mtp_core.api import BuildContext, JsonlOptions, RowFiles, WmtpError
from weighted_mtp_core.builtin.chat import build_chat
from weighted_mtp_core.builtin.jsonl import build_jsonl

CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CHATS = [
    {
        "messages": [
            {"role": "user", "content": "서울?"},
            {"role": "assistant", "content": "수도 🙂", "weights": [[0, 2, 0.5]], "weight": 2.0},
        ],
        "weight": 0.25,
    },
    {
        "messages": [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "2", "name": "add"},
            {"role": "assistant", "content": "2"},
        ],
    },
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]
ROWS = [{"prompt": f"{i}: ", "response": str(i), "is_correct": i % 2 == 0} for i in range(4)]


@pytest.fixture
def chat(tmp_path):
    return lambda **files: build_chat(RowFiles(**files), BuildContext(seed=0, storage=tmp_path / "storage"))


@pytest.fixture
def rows(tmp_path):
    return lambda **files: build_jsonl(
        JsonlOptions(**files), BuildContext(seed=0, storage=tmp_path / "storage")
    )


def lines(path, records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return str(path)


def table(path, records):
    parquet.write_table(Table.from_pylist(records, schema=_schema(records)), path)
    return str(path)


def _schema(records):
    """Return a schema with the keys of all records; `from_pylist` only reads the keys of the first record."""
    keys = {key for record in records for key in record}
    return Table.from_pylist([{key: record.get(key) for key in keys} for record in records]).schema


def saved(folder, records, *, parts):
    """Write what `Dataset.save_to_disk` of `datasets` writes: Arrow streams, listed in `state.json`."""
    folder.mkdir(parents=True)
    schema, names = _schema(records), []
    for part in range(parts):
        names.append(f"data-{part:05d}-of-{parts:05d}.arrow")
        with ipc.new_stream(folder / names[-1], schema) as stream:
            stream.write_table(Table.from_pylist(records[part::parts], schema=schema))
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return str(folder)


def test_chats_in_a_table_are_those_in_lines(tmp_path, chat):
    from_table = chat(train=table(tmp_path / "a.parquet", CHATS)).examples("train")
    from_lines = chat(train=lines(tmp_path / "a.jsonl", CHATS)).examples("train")

    assert from_table == from_lines
    assert from_table[0].messages[1]["weights"] == ((0, 2, 0.5),)
    assert [set(message) for message in from_table[2].messages] == [{"role", "content"}] * 2


def test_rows_in_a_table_are_those_in_lines(tmp_path, rows):
    from_table = rows(train=table(tmp_path / "a.parquet", ROWS)).examples("train")

    assert from_table == rows(train=lines(tmp_path / "a.jsonl", ROWS)).examples("train")


def test_a_saved_data_set_is_read_in_its_own_order(tmp_path, rows):
    source = rows(train=saved(tmp_path / "numbers" / "train", ROWS, parts=2))

    assert [each.response for each in source.examples("train")] == ["0", "2", "1", "3"]
    assert source.version().name == "train"


def test_a_pattern_names_files_in_the_order_of_their_names(tmp_path, rows):
    for part in (1, 0):
        table(tmp_path / f"train-{part}.parquet", ROWS[part::2])
    table(tmp_path / "test-0.parquet", [{**ROWS[0], "prompt": "t"}])

    source = rows(train=str(tmp_path / "train-*.parquet"), test=str(tmp_path / "test-0.parquet"))

    assert [each.response for each in source.examples("train")] == ["0", "2", "1", "3"]
    assert [each.name for each in source.files] == ["train-0.parquet", "train-1.parquet", "test-0.parquet"]


def test_the_identity_of_the_data_is_the_bytes_of_all_files(tmp_path, rows):
    files = [Path(table(tmp_path / f"train-{part}.parquet", ROWS[part::2])) for part in (0, 1)]
    digests = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)

    version = rows(train=str(tmp_path / "train-*.parquet")).version()
    table(files[1], [{**ROWS[1], "response": "9"}])
    changed = rows(train=str(tmp_path / "train-*.parquet")).version()

    assert version.sha256 == hashlib.sha256(digests.encode()).hexdigest()
    assert changed.sha256 != version.sha256


def test_bad_rows_of_a_table_are_named_with_file_and_number(tmp_path, chat):
    path = table(tmp_path / "a.parquet", [CHATS[2], {"messages": CHATS[2]["messages"][:1]}, CHATS[2]])

    with pytest.raises(WmtpError) as caught:
        chat(train=path)

    assert str(caught.value) == (
        f"{path}: 1 bad row\n  row 2: the last message is of the role `user`, expected `assistant`"
    )


def test_a_problem_in_two_files_of_different_splits_is_named(tmp_path, rows):
    train = table(tmp_path / "train.parquet", ROWS)

    with pytest.raises(WmtpError, match=r"is in both `train` and `test`, first in `.*train\.parquet` row 1"):
        rows(train=train, test=lines(tmp_path / "test.jsonl", ROWS[:1]))


@pytest.mark.parametrize("content", [b"PAR1", b'{"prompt": "a", "response": "b"}\n'])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_damaged_table_is_named(tmp_path, rows, content, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)

    with pytest.raises(WmtpError, match=rf"cannot read `{path}`: "):
        rows(train=str(path))


def test_a_folder_of_splits_asks_for_one(tmp_path, rows):
    saved(tmp_path / "set" / "train", ROWS, parts=1)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')

    with pytest.raises(WmtpError) as caught:
        rows(train=str(tmp_path / "set"))

    assert str(caught.value) == f"`{tmp_path}/set` holds several splits"
    assert caught.value.hint == f"name one of `{tmp_path}/set/train`, `{tmp_path}/set/test`"


@pytest.mark.parametrize(
    "content", ["{", "{}", "[]", '{"_data_files": [{}]}', '{"_data_files": 3, "splits": 3}']
)
@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_damaged_folder_is_refused(tmp_path, rows, name, content):
    file = tmp_path / name
    file.write_text(content)

    with pytest.raises(WmtpError) as caught:
        rows(train=str(tmp_path))

    assert str(caught.value) == f"`{file}` is damaged: it does not list what belongs to a data set"


def test_another_folder_is_refused(tmp_path, rows):
    with pytest.raises(WmtpError) as caught:
        rows(train=str(tmp_path))

    assert str(caught.value) == f"`{tmp_path}` is a folder, and not one that `Dataset.save_to_disk` wrote"
    assert caught.value.hint == f"name its files, for example `{tmp_path}/*.parquet`"


def test_a_pattern_without_files_is_refused(tmp_path, rows):
    with pytest.raises(WmtpError, match=r"no file matches `.*none-\*\.parquet`"):
        rows(train=str(tmp_path / "none-*.parquet"))


# ------------------------------------------------------------------ the hub


def test_a_copy_from_the_hub_is_read_without_the_package_and_the_network(tmp_path, rows):
    copies = tmp_path / "storage" / "downloads"
    copies.mkdir(parents=True)
    table(copies / "team--sums--v1--main--train.parquet", ROWS)

    source = rows(train="hub:team/sums@v1:main:train")

    assert [each.response for each in source.examples("train")] == ["0", "1", "2", "3"]
    assert source.version().name == "team--sums--v1--main--train"


def test_the_hub_needs_a_package_which_the_message_names(rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed

    with pytest.raises(WmtpError) as caught:
        rows(train="hub:team/sums:train")

    assert str(caught.value) == "`team/sums` must be fetched from the hub, which needs the package `datasets`"
    assert caught.value.hint == (
        "pip install 'weighted-mtp-core[hub]', or name local files in `[data.options]`"
    )


def test_a_data_set_is_copied_once_and_read_with_all_its_keys(tmp_path, monkeypatch, chat):
    """`load_dataset` reads a folder in the current directory as it reads a repository of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Path("team/talks").mkdir(parents=True)
    table(Path("team/talks/train.parquet"), CHATS)

    first = chat(train="hub:team/talks:train").examples("train")
    Path("team/talks/train.parquet").unlink()
    again = chat(train="hub:team/talks:train").examples("train")

    assert first == again == chat(train=lines(tmp_path / "a.jsonl", CHATS)).examples("train")
    with pytest.raises(WmtpError, match="cannot fetch `team/nothing` from the hub: "):
        chat(train="hub:team/nothing:train")


@pytest.mark.parametrize("address", ["hub:team/sums", "hub:a/b/c:train", "hub:team/sums:x:y:z", "hub::train"])
def test_an_address_that_cannot_be_read_is_refused(rows, address):
    with pytest.raises(WmtpError) as caught:
        rows(train=address)

    assert str(caught.value) == f"`{address}` is not an address of the hub"
    assert caught.value.hint == "hub:OWNER/NAME:SPLIT, or hub:OWNER/NAME@REVISION:CONFIGURATION:SPLIT"
