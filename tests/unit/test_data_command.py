"""`data prepare` labels without a run; `data show` says what is there and what its labels depend on."""

import json

import pytest
from weighted_mtp_core.cli import main

RECIPE = """
    [run]
    name = "small"
    [data]
    use = "code_tasks.mbpp"
    options = { path = "mbpp.jsonl", mutants = 0 }
    [weighting]
    use = "core.none"
    [sandbox]
    workers = 1
"""
ROW = {
    "task_id": 602,
    "text": "Write a function to double a number.",
    "code": "def double(n):\n    return 2 * n",
    "test_setup_code": "",
    "test_list": ["assert double(3) == 6"],
    "challenge_test_list": [],
}


@pytest.fixture
def recipe(write_recipe, example_plugin):
    path = write_recipe(RECIPE.replace("core.none", f"{example_plugin}.flat"))
    path.with_name("mbpp.jsonl").write_text(json.dumps(ROW) + "\n")
    return str(path)


def test_prepare_labels_and_show_tells_of_it(recipe, capsys):
    assert main(["data", "prepare", recipe]) == 0
    prepared = capsys.readouterr().out
    assert main(["data", "show", "mbpp"]) == 0
    shown = capsys.readouterr().out

    (line,) = [line.split() for line in prepared.splitlines() if line.startswith("train")]
    assert line[:4] == ["train", "1", "1", "100.0%"]
    assert prepared.strip() in shown
    assert "solutions: passed 1" in shown
    assert "cpu_seconds 5" in shown


def test_a_second_prepare_labels_nothing_anew(recipe, capsys):
    main(["data", "prepare", recipe])
    first = capsys.readouterr()
    main(["data", "prepare", recipe])
    second = capsys.readouterr()

    assert "labelling mbpp: 1 responses" in first.err
    assert second.err == ""
    assert second.out == first.out


def test_data_that_keep_nothing_are_counted_too(recipe, tmp_path, capsys):
    rows = [
        {"instruction": "i", "input": "", "output": "o", "problem_id": i, "is_correct": bool(i % 2)}
        for i in range(30)
    ]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ["--set", "data.use=core.jsonl", "--set", f"data.options={{train='{own}', test='{own}.2'}}"]
    own.with_name("own.jsonl.2").write_text(json.dumps({**rows[0], "problem_id": 99}) + "\n")

    assert main(["data", "prepare", recipe, *changes]) == 0
    assert "50.0%" in capsys.readouterr().out


def test_show_says_what_there_is_not(recipe, capsys):
    assert main(["data", "show"]) == 2
    assert "there is no labelled data in `storage`" in capsys.readouterr().err
    main(["data", "prepare", recipe])
    assert main(["data", "show", "mbbp"]) == 2
    assert "did you mean `mbpp`?" in capsys.readouterr().err
