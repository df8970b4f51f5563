"""CodeContests in its public format: right and wrong programs that read stdin are run and labelled."""

import json

import pytest
from pyarrow import Table, parquet
from weighted_mtp_core.api import BuildContext, WmtpError

from weighted_mtp_code_tasks.code_contests import CodeContestsOptions, build_code_contests
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings

RIGHT = "a, b = map(int, input().split())\r\nprint(a + b)"
OTHER = "print(sum(int(x) for x in input().split()))\n"
WRONG = "a, b = map(int, input().split())\nprint(a - b)\n"
SUM = {
    "name": "1_A. Sum",
    "description": 'Read two numbers and print their """sum""".',
    "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
    "private_tests": {"input": ["5 0\n"], "output": ["5\n"]},
    "generated_tests": {"input": ["7 7\n", "0 1\n"], "output": ["14\n", "1\n"]},
    "source": 2,
    "difficulty": 7,
    "solutions": {"language": [2, 3, 1, 3], "solution": ["int main(){}", RIGHT, "print 3", OTHER]},
    "incorrect_solutions": {"language": [3, 3, 4], "solution": [WRONG, OTHER, "class A {}"]},
    "cf_rating": 800,
    "time_limit": {"seconds": 1, "nanos": 0},
    "input_file": "",
    "output_file": "",
}
UNSUITABLE = [
    {**SUM, "name": "reads a file", "input_file": "input.txt"},
    {**SUM, "name": "has no Python", "solutions": {"language": [2], "solution": ["int main(){}"]}},
    {**SUM, "name": "has no tests"}
    | {key: {"input": [], "output": []} for key in ("public_tests", "private_tests", "generated_tests")},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def build(folder, **options):
    sandbox = SandboxSettings(workers=1, cpu_seconds=2)
    context = BuildContext(seed=0, storage=folder / "storage")
    return build_code_contests(CodeContestsOptions(sandbox=sandbox, **options), context)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contests")
    train = write(folder / "train.jsonl", [SUM, *UNSUITABLE])
    table = folder / "valid.parquet"
    parquet.write_table(Table.from_pylist([{**SUM, "name": "2_B. Sum"}]), table)
    return build(folder, train=(train,), validation=(str(table),), cases=3)


def test_programs_in_python_3_are_labelled_by_what_they_write(data):
    labels = {example.response: example.reward for example in data.examples("train")}

    assert labels == {RIGHT.replace("\r\n", "\n") + "\n": 1.0, OTHER: 1.0, WRONG: 0.0}


def test_problems_without_stdin_tests_or_python_are_left_out(data):
    assert [problem.problem_id for problem in data.problems("train")] == ["code_contests/1_A. Sum"]


def test_a_table_is_read_like_lines(data):
    lines, table = (list(data.examples(split)) for split in ("train", "validation"))

    assert [each.response for each in table] == [each.response for each in lines]


def test_public_cases_come_first_and_no_more_than_asked_for(data):
    (problem,) = data.problems("train")

    assert json.loads(problem.tests) == [["1 2\n", "3\n"], ["5 0\n", "5\n"], ["7 7\n", "14\n"]]


@pytest.mark.parametrize(
    "text",
    [
        OTHER,
        f"Read, then add:\n\n```python\n{OTHER}```\nThis works: it adds.",
        f"{OTHER}```\nand so on",
        f"Solution\n{OTHER}\nThat is all.",
    ],
)
def test_a_completion_is_the_program_however_it_is_wrapped(data, text):
    (problem,) = data.problems("train")
    completion = data.completion(problem, text)
    (verdict,) = data.verify([(problem, completion)])

    assert verdict.passed
    assert "`" not in completion


def test_a_problem_in_two_splits_is_refused(tmp_path):
    file = write(tmp_path / "one.jsonl", [SUM])
    with pytest.raises(WmtpError, match="is in both `train` and `test`"):
        build(tmp_path, train=(file,), test=(file,))


def test_bad_records_are_named(tmp_path):
    rows = [
        {**SUM, "solutions": {"language": [3], "solution": []}},
        {**SUM, "public_tests": {"input": ["1"], "output": []}},
        {key: value for key, value in SUM.items() if key != "private_tests"},
    ]
    with pytest.raises(WmtpError) as caught:
        build(tmp_path, train=(write(tmp_path / "bad.jsonl", rows),))

    assert "line 1: `solutions` needs a `language` for each `solution`" in str(caught.value)
    assert "line 2: `public_tests` has 1 inputs and 0 outputs" in str(caught.value)
    assert "line 3: needs `private_tests`, an object of lists" in str(caught.value)


def test_a_damaged_table_is_said(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(WmtpError, match=r"cannot read `.*bad.parquet`"):
        build(tmp_path, train=(str(tmp_path / "bad.parquet"),))


def test_no_file_is_said(tmp_path):
    with pytest.raises(WmtpError, match="name the public files of a split"):
        build(tmp_path)
