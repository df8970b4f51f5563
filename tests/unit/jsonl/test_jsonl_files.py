"""Files have one JSON object a line, bad lines are named by number, and splits have whole problems."""

import json

import pytest
from jsonl_source import ROW, build
from weighted_mtp_core.api import WmtpError

# ------------------------------------------------------------------ lines


def test_line_separators_inside_a_text_do_not_break_a_line(tmp_path, write):
    row = {**ROW, "output": "a\u2028b\x85c\n"}

    (example,) = build(tmp_path, train=write(json.dumps(row, ensure_ascii=False))).examples("train")

    assert example.response == "a\u2028b\x85c\n"


def test_every_bad_line_is_reported_with_its_number(tmp_path, write):
    path = write(
        ROW,
        "{not json",
        "[1]",
        {**ROW, "problem_id": None},
        {**ROW, "output": ""},
        {**ROW, "is_correct": "true"},
        "",
        {**ROW, "tests": "def check(candidate): pass"},
        {**ROW, "metadata": 3},
        {**ROW, "input": 4},
    )
    with pytest.raises(WmtpError) as caught:
        build(tmp_path, train=path)

    assert str(caught.value) == (
        f"{path}: 8 bad lines\n"
        "  line 2: not JSON: Expecting property name enclosed in double quotes at column 2\n"
        "  line 3: expected an object, got list\n"
        "  line 4: `problem_id` must be a string or a whole number, got null\n"
        "  line 5: needs `output`, a string that is not empty\n"
        "  line 6: needs `is_correct`, true or false\n"
        "  line 8: has `tests`, so it needs `entry_point`, the function that they call\n"
        "  line 9: `metadata` must be an object\n"
        "  line 10: `input` must be a string, got int"
    )


def test_after_twenty_bad_lines_the_rest_is_counted(tmp_path, write):
    with pytest.raises(WmtpError, match=r"25 bad lines[\s\S]*line 20: [^\n]*\n  and 5 more$"):
        build(tmp_path, train=write(*["{}"] * 25))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"output": "\\ud83d"}', "`output` contains half a character, `\\ud83d` without its pair"),
        ('{"a": [1, {"b": "\\udc00x"}]}', "`a[1].b` contains half a character, `\\udc00` without its pair"),
        (
            '{"problem_id": ' + "9" * 5000 + "}",
            "contains an integer of more than 4300 digits: write it as a string",
        ),
        ('{"a": ' + "[" * 99999 + "]" * 99999 + "}", "nested too deeply"),
        ('{"output": "\udcff"}', "not UTF-8: byte 0xff at column 13"),
    ],
    ids=["surrogate", "nested surrogate", "huge", "deep", "byte"],
)
def test_what_python_cannot_represent_is_named_by_line(tmp_path, line, fault):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n", encoding="utf-8", errors="surrogateescape")

    with pytest.raises(WmtpError) as caught:
        build(tmp_path, train=path)

    assert f"1 bad line\n  line 2: {fault}" in str(caught.value)


def test_a_pair_of_surrogates_is_one_character(tmp_path, write):
    (example,) = build(tmp_path, train=write({**ROW, "output": "\U0001f600"})).examples("train")

    assert example.response == "\U0001f600"


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROW), encoding="utf-8-sig")

    assert len(build(tmp_path, train=path).examples("train")) == 1


@pytest.mark.parametrize(
    "text", [json.dumps([ROW, ROW]), json.dumps([ROW], indent=1), json.dumps(ROW, indent=1)]
)
def test_json_that_is_not_one_object_a_line_is_named(tmp_path, write, text):
    with pytest.raises(WmtpError, match="is JSON, but not one object per line") as caught:
        build(tmp_path, train=write(text))

    assert caught.value.hint.startswith("jq -c ")


def test_another_encoding_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROW), encoding="utf-16")

    with pytest.raises(WmtpError, match=r"cannot read `.*data\.jsonl`: it is UTF-16"):
        build(tmp_path, train=path)


# ------------------------------------------------------------------ files and splits


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(WmtpError, match=r"there is no file `.*none\.jsonl`"):
        build(tmp_path, train=tmp_path / "none.jsonl")


@pytest.mark.parametrize("both", [True, False])
def test_either_one_file_or_a_file_a_split(tmp_path, write, both):
    options = {"path": write(ROW), "train": write(ROW)} if both else {}

    with pytest.raises(WmtpError, match="name either one file"):
        build(tmp_path, **options)


def test_one_file_is_split_by_problem_whatever_else_is_in_it(tmp_path, write):
    rows = [{**ROW, "problem_id": f"p{i // 2}"} for i in range(400)]
    data = build(tmp_path, path=write(*rows))
    names = {s: {e.problem_id for e in data.examples(s)} for s in ("train", "validation", "test")}

    assert sum(map(len, names.values())) == 200
    assert 10 <= len(names["test"]) <= 30

    fewer = build(tmp_path, path=write(*rows[:100], name="fewer.jsonl"))

    assert {e.problem_id for e in fewer.examples("test")} <= names["test"]


def test_all_rows_of_one_prompt_are_in_one_split(tmp_path, write):
    rows = [{"prompt": f"{i // 4}", "response": f"{i}"} for i in range(400)]
    data = build(tmp_path, path=write(*rows))
    prompts = [{each.prompt for each in data.examples(split)} for split in ("train", "validation", "test")]

    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 100
    assert min(map(len, prompts)) > 0


def test_a_problem_in_two_files_is_an_error(tmp_path, write):
    with pytest.raises(WmtpError, match="problem `double` is in both `train` and `test`"):
        build(tmp_path, train=write(ROW, name="a"), test=write(ROW, name="b"))


def test_the_version_moves_with_one_byte(tmp_path, write):
    before = build(tmp_path, train=write(ROW)).version()
    after = build(tmp_path, train=write({**ROW, "output": ROW["output"] + " "})).version()

    assert before.sha256 != after.sha256
    assert build(tmp_path, train=write(ROW)).version() == before
