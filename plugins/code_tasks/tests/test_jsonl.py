"""`code_tasks.jsonl`: completions are judged by the tests in the user's own rows."""

import json

import pytest
from weighted_mtp_core.api import BuildContext
from weighted_mtp_core.testing import DataSourceSuite

from weighted_mtp_code_tasks.jsonl import JudgedJsonlOptions, build_jsonl

ROW = {
    "instruction": "Double a number.",
    "input": "",
    "output": "def f(n):\n    return 2 * n\n",
    "problem_id": "double",
    "is_correct": True,
    "metadata": {"level": 1},
}
TESTED = {
    **ROW,
    "tests": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "f",
}
UNTESTED = ROW | {"problem_id": "untested"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def build(tmp_path, *rows):
    test, train = write(tmp_path / "test", *rows), write(tmp_path / "train", ROW | {"problem_id": "o"})
    return build_jsonl(JudgedJsonlOptions(test=test, train=train), BuildContext(seed=0, storage=tmp_path))


def test_rows_with_tests_are_problems_that_can_be_judged(tmp_path):
    data = build(tmp_path, TESTED, UNTESTED)
    (problem,) = data.problems("test")
    verdicts = data.verify([(problem, TESTED["output"]), (problem, "def f(n):\n    return n\n")])

    assert [verdict.passed for verdict in verdicts] == [True, False]


def test_the_prompt_is_no_part_of_the_program_and_the_text_around_it_neither(tmp_path):
    data = build(tmp_path, TESTED)
    (problem,) = data.problems("test")
    text = "Here it is:\n\n```python\n" + TESTED["output"] + "```\nIt doubles.\n"

    assert problem.prompt == data.examples("test")[0].prompt
    assert data.completion(problem, text) == TESTED["output"]


def test_a_correct_row_gives_the_solution_whatever_their_order(tmp_path):
    wrong = TESTED | {"output": "def f(n):\n    return n\n", "is_correct": False}

    for rows in ([wrong, TESTED], [TESTED, wrong]):
        (problem,) = build(tmp_path, *rows).problems("test")
        assert problem.solution == TESTED["output"]
    (problem,) = build(tmp_path, wrong).problems("test")
    assert problem.solution is None


class TestConformance(DataSourceSuite):
    address = "code_tasks.jsonl"

    @pytest.fixture
    def options(self, tmp_path):
        rows = [TESTED | {"problem_id": f"p{i}"} for i in range(30)]
        return {"path": write(tmp_path / "rows.jsonl", *rows)}

    @pytest.fixture
    def changed_options(self, tmp_path):
        return {"path": write(tmp_path / "other.jsonl", TESTED)}
