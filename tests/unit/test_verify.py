"""`verify`: samples in, one verdict of the data source each, and every mistake named with its line."""

import gzip
import json

import pytest
from weighted_mtp_core.cli import main

RECIPE = """
    [run]
    name = "judged"
    [data]
    use = "sums"
    [weighting]
    use = "example.flat"
"""
SAMPLE = {"task_id": "sums/18", "completion": "36"}


@pytest.fixture
def recipe(write_recipe, install_plugin, judged_plugin):
    install_plugin("example")
    install_plugin("sums", judged_plugin)
    return write_recipe(RECIPE)


@pytest.fixture
def verify(recipe, tmp_path, capsys):
    """Run `verify` on samples; return its exit code, stdout and stderr."""

    def verify(samples, *more, out="results/R.jsonl"):
        if samples is not None:
            lines = [row if isinstance(row, str) else json.dumps(row) for row in samples]
            (tmp_path / "work" / "S.jsonl").write_text("".join(f"{line}\n" for line in lines))
        code = main(["verify", str(recipe), "--samples", "S.jsonl", "--out", out, *more])
        return (code, *capsys.readouterr())

    return verify


@pytest.fixture
def results(tmp_path):
    """Return the rows that `verify` wrote."""
    return lambda: [json.loads(x) for x in (tmp_path / "work/results/R.jsonl").read_text().splitlines()]


@pytest.fixture
def error_of(verify, tmp_path):
    """Return the error of `verify`."""

    def error_of(samples, *more):
        code, out, err = verify(samples, *more)
        assert (code, out) == (2, "")
        assert not (tmp_path / "work" / "results").exists()
        return err

    return error_of


def test_each_sample_gets_its_verdict_in_the_order_of_the_samples(verify, results):
    samples = [
        SAMPLE,
        {"problem_id": "sums/19", "completion": "38"},
        {"task_id": "sums/18", "completion": " 36"},  # judged as it is
        SAMPLE,
    ]

    code, out, _ = verify(samples)

    assert code == 0
    assert results() == [
        {"task_id": "sums/18", "passed": True, "verdict": "passed", "detail": ""},
        {"task_id": "sums/19", "passed": True, "verdict": "passed", "detail": ""},
        {"task_id": "sums/18", "passed": False, "verdict": "wrong", "detail": "expected 36"},
        {"task_id": "sums/18", "passed": True, "verdict": "passed", "detail": ""},
    ]
    assert out == "3 of 4 samples passed; results in results/R.jsonl\npassed 3, wrong 1\n"


def test_problems_of_another_split(verify, error_of, results):
    assert error_of([{"task_id": "sums/0", "completion": "0"}]) == (
        "error: S.jsonl: 1 bad line\n  line 1: no problem has the task_id `sums/0`\n"
        "hint: the problems are in another split: add `--split train`\n"
    )

    code, _, _ = verify([{"task_id": "sums/0", "completion": "0"}], "--split", "train")

    assert code == 0
    assert results()[0]["passed"]


def test_gzipped_samples_are_read(verify, results, tmp_path):
    (tmp_path / "work" / "S.jsonl.gz").write_bytes(gzip.compress(json.dumps(SAMPLE).encode()))

    assert verify(None, "--samples", "S.jsonl.gz")[0] == 0
    assert results()[0]["passed"] is True


def test_a_sample_without_a_problem_is_an_error(error_of):
    assert error_of([SAMPLE, SAMPLE | {"task_id": "sums/188"}]) == (
        "error: S.jsonl: 1 bad line\n  line 2: no problem has the task_id `sums/188`\n"
        "hint: did you mean `sums/18`?\n"
    )


def test_all_malformed_lines_are_named_at_once(error_of):
    lines = [
        SAMPLE,
        "{",
        "",
        "[1]",
        {"task_id": "sums/18"},
        {"task_id": 3, "completion": "x"},
        '{"task_id": "T',
    ]

    assert error_of(lines) == (
        "error: S.jsonl: 5 bad lines\n"
        "  line 2: not JSON: Expecting property name enclosed in double quotes at column 2\n"
        "  line 4: expected an object, got list\n"
        "  line 5: needs `completion`, a string\n"
        "  line 6: needs `task_id` (or `problem_id`), a string\n"
        "  line 7: not JSON: Unterminated string starting at at column 13\n"
    )


def test_many_faults_are_counted_and_not_all_shown(error_of):
    text = error_of(["{"] * 25)

    assert text.startswith("error: S.jsonl: 25 bad lines\n")
    assert text.endswith("\n  and 5 more\n")


def test_an_empty_file_is_an_error(error_of):
    assert error_of([]) == "error: `S.jsonl` has no lines\n"


def test_a_file_that_cannot_be_read_is_an_error(error_of):
    assert error_of(None) == "error: cannot read `S.jsonl`: No such file or directory\n"


@pytest.mark.parametrize("out", ["S.jsonl", "recipe.toml", "data.jsonl"])
def test_the_results_never_overwrite_what_they_come_from(verify, out, tmp_path):
    more = ["--set", "data.use=core.jsonl", "--set", "data.options.test=data.jsonl"] if "data" in out else []
    before = (tmp_path / "work" / "recipe.toml").read_text()

    code, _, err = verify([SAMPLE], *more, out=out)

    assert (code, err) == (2, f"error: `--out {out}` would overwrite its own input\n")
    assert (tmp_path / "work" / "recipe.toml").read_text() == before


def test_a_source_without_problems_says_so(error_of, tmp_path):
    row = {"instruction": "i", "output": "o", "problem_id": 1, "is_correct": True}
    (tmp_path / "work" / "own.jsonl").write_text(json.dumps(row))
    own = ("--set", "data.use=core.jsonl", "--set", "data.options.test=own.jsonl")

    assert error_of([SAMPLE], *own) == "error: data source `core.jsonl` has no problems in the split `test`\n"


def test_a_source_without_problems_in_this_split_names_the_splits_that_have_some(
    error_of, install_plugin, judged_plugin
):
    install_plugin("untested", judged_plugin.replace("range(18, 20)", "()"))

    assert error_of([SAMPLE], "--set", "data.use=untested") == (
        "error: data source `untested.sums` has no problems in the split `test`\n"
        "hint: the problems are in another split: add `--split train` or `--split validation`\n"
    )
