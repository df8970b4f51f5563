"""MBPP in its public format: the task number decides the split, and running each program labels it."""

import json
from collections import Counter

import pytest
from weighted_mtp_core.api import BuildContext, WmtpError

from weighted_mtp_code_tasks.mbpp import MbppOptions, build_mbpp
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings

SQUARE = {
    "text": "Write a function to square a number.",
    "code": "def helper(n):\r\n  return n * n\r\ndef square(n):\r\n  return helper(n)",
    "task_id": 602,
    "test_setup_code": "",
    "test_list": ["assert square(3) == 9", "assert square(-2) == 4"],
    "challenge_test_list": [],
}
NODES = {
    "text": 'Write a function to """find""" the depth of a chain.',
    "code": "class Node:\r\n  def __init__(self, next=None):\r\n    self.next = next\r\n"
    "def depth(node):\r\n  return 0 if node is None else 1 + depth(node.next)",
    "task_id": 11,
    "test_setup_code": "root = Node() \r\nroot.next = Node()",
    "test_list": ["assert depth(root) == 2", "assert depth(None) == 0"],
    "challenge_test_list": [],
}
ROWS = (SQUARE, NODES, {**SQUARE, "task_id": 511}, {**SQUARE, "task_id": 3})
SAMPLES = (
    {"task_id": 602, "program": "def square(n):\n    return n ** 2", "verdict": "fail"},
    {"task_id": 602, "program": "def square(n):\n    return 2 * n", "verdict": "pass"},
    {"task_id": 602, "program": SQUARE["code"], "verdict": "pass"},
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def build(folder, **options):
    sandbox = SandboxSettings(workers=1, cpu_seconds=2)
    context = BuildContext(seed=0, storage=folder / "storage")
    return build_mbpp(MbppOptions(sandbox=sandbox, **options), context)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mbpp")
    path, samples = write(folder / "mbpp.jsonl", ROWS), write(folder / "samples.jsonl", SAMPLES)
    return build(folder, path=path, samples=samples, mutants=2)


def test_a_task_number_decides_the_split_and_the_prompts_ten_are_in_none(data):
    found = {split: [p.problem_id for p in data.problems(split)] for split in ("train", "validation", "test")}

    assert found == {"train": ["mbpp/602"], "validation": ["mbpp/511"], "test": ["mbpp/11"]}


def test_samples_are_labelled_by_running_them_whatever_their_file_says(data):
    labels = {example.response: example.reward for example in data.examples("train")}

    assert labels["def square(n):\n    return n ** 2\n"] == 1.0
    assert labels["def square(n):\n    return 2 * n\n"] == 0.0


def test_a_program_is_there_once(data):
    responses = [example.response for example in data.examples("train")]

    assert len(set(responses)) == len(responses)
    assert responses[0] == SQUARE["code"].replace("\r\n", "\n") + "\n"


def test_the_prompt_holds_the_task_and_the_tests_and_stays_one_docstring(data):
    (problem,) = data.problems("test")
    scope = {}
    exec(f"said = {problem.prompt}", scope)

    assert "depth(None) == 0" in scope["said"]
    assert "'''find'''" in scope["said"]


def test_a_completion_is_judged_alone_with_the_setup_of_its_tests(data):
    (problem,) = data.problems("test")
    texts = [f"```python\n{problem.solution}```\nDone.", problem.solution.replace("1 +", "2 +")]
    verdicts = data.verify([(problem, data.completion(problem, text)) for text in texts])

    assert [verdict.kind.value for verdict in verdicts] == ["passed", "wrong"]


def test_other_samples_are_other_data(data, tmp_path):
    path = write(tmp_path / "mbpp.jsonl", ROWS)

    assert build(tmp_path, path=path, mutants=0).version() != data.version()


def test_bad_records_are_all_named(tmp_path):
    rows = [
        {**SQUARE, "code": "def square(n:"},
        {**SQUARE, "test_list": "assert"},
        {**SQUARE, "task_id": "x"},
    ]
    with pytest.raises(WmtpError) as caught:
        build(tmp_path, path=write(tmp_path / "mbpp.jsonl", rows))

    assert str(caught.value).startswith(
        f"{tmp_path}/mbpp.jsonl: 3 bad lines\n  line 1: `code` is not valid Python"
    )
    assert "line 2: needs `test_list`, a list of strings" in str(caught.value)
    assert "line 3: needs `task_id`, a whole number" in str(caught.value)


def test_a_sample_of_no_problem_is_refused(tmp_path):
    samples = write(tmp_path / "samples.jsonl", [{"task_id": 9999, "program": "x = 1"}])
    with pytest.raises(WmtpError, match="no problem has the task_id `9999`"):
        build(tmp_path, path=write(tmp_path / "mbpp.jsonl", ROWS), samples=samples)


def test_a_second_problem_with_an_id_names_both_lines(tmp_path):
    path = write(tmp_path / "mbpp.jsonl", [SQUARE, {**SQUARE, "code": "def square(n):\n    return n ** 2"}])
    with pytest.raises(WmtpError, match=r"line 2: problem `\d+` is already defined in `.*` line 1$"):
        build(tmp_path, path=path)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(WmtpError, match=r"cannot read `nowhere.jsonl`: No such file"):
        build(tmp_path, path="nowhere.jsonl")


def test_recorded_verdicts_of_models_and_mutants_hold(shared_data, tmp_path):
    """Use every 240th recorded program, except those of task 123, whose own solution takes seconds."""
    recorded = [row for row in read(shared_data / "mbpp_solutions.jsonl")[::240] if row["task_id"] != 123]
    wanted = {row["task_id"] for row in recorded}
    data = build(
        tmp_path,
        path=write(
            tmp_path / "mbpp.jsonl",
            [row for row in read(shared_data / "mbpp.jsonl") if row["task_id"] in wanted],
        ),
        samples=write(tmp_path / "samples.jsonl", recorded),
        mutants=0,
    )
    splits = ("train", "validation", "test")
    labels = {(e.problem_id, e.response): e.reward for split in splits for e in data.examples(split)}
    agreement = Counter(
        labels[key] == (row["verdict"] == "pass")
        for row in recorded
        if (key := (f"mbpp/{row['task_id']}", row["program"].rstrip() + "\n")) in labels
    )

    assert sum(len(data.problems(split)) for split in splits) == len(wanted)
    assert agreement[False] <= 0.005 * len(recorded)
    assert agreement[True] >= 0.95 * len(recorded)
