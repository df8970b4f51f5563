"""`data prepare` labels data without a run; `data show` prints statistics, and what the labels depend on."""

import json
from pathlib import Path

import pytest

ROW = {
    "task_id": 602,
    "text": "Write a function to double a number.",
    "code": "def double(n):\n    return 2 * n",
    "test_setup_code": "",
    "test_list": ["assert double(3) == 6"],
    "challenge_test_list": [],
}


@pytest.fixture
def prepare(write_recipe, wmtp_cli):
    """Return a function that runs `data prepare` on a file with one problem."""
    recipe = write_recipe("code_tasks.mbpp")
    Path("mbpp.jsonl").write_text(json.dumps(ROW) + "\n")
    options = "data.options={path='mbpp.jsonl', mutants=0, sandbox.workers=1}"
    return lambda *more: wmtp_cli("data", "prepare", recipe, "--set", options, *more)


def test_prepare_labels_and_show_tells_of_it(prepare, wmtp_cli, capsys):
    assert prepare() == 0
    prepared = capsys.readouterr().out
    assert wmtp_cli("data", "show", "mbpp") == 0
    shown = capsys.readouterr().out

    (line,) = [line.split() for line in prepared.splitlines() if line.startswith("train")]
    assert line[:4] == ["train", "1", "1", "100.0%"]
    assert prepared.strip() in shown
    assert "solution: passed 1" in shown
    assert "cpu_seconds 5" in shown
    assert "tests_sha256: " in shown


def test_a_second_prepare_labels_nothing_anew(prepare, capsys):
    prepare()
    first = capsys.readouterr()
    prepare()
    second = capsys.readouterr()

    assert "labelling mbpp: 1 responses" in first.err
    assert second.err == ""
    assert second.out == first.out


def test_show_says_what_there_is_not(prepare, wmtp_cli, capsys):
    assert wmtp_cli("data", "show") == 2
    assert "there is no data in `storage`" in capsys.readouterr().err
    prepare()
    assert wmtp_cli("data", "show", "mbbp") == 2
    assert "did you mean `mbpp`?" in capsys.readouterr().err


def test_doctor_tries_the_sandbox_of_the_recipe(prepare, wmtp_cli, capsys):
    def sandbox_lines(backend):
        Path("recipe.toml").write_text(
            Path("recipe.toml").read_text().partition("[data.options")[0]
            + f'[data.options.sandbox]\nbackend = "{backend}"\n'
        )
        wmtp_cli("doctor", "recipe.toml")
        return [line for line in capsys.readouterr().out.splitlines() if " sandbox: " in line]

    (auto,) = sandbox_lines("auto")
    assert auto.startswith("✓ ok      sandbox: ")
    assert "landlock" in auto
    assert sandbox_lines("landlock") == ["✓ ok      sandbox: landlock"]
    assert sandbox_lines("trusted") == ["! warning sandbox: none: programs run without a sandbox"]
