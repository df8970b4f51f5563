"""Faults of a data source are found before anything is trained, and messages name its plugin."""

import attrs
import pytest
from weighted_mtp_core.api import DatasetVersion, DataSource, Example, Problem, WmtpError
from weighted_mtp_core.data.checks import check_examples, checked_version
from weighted_mtp_core.plugins.loading import Kind
from weighted_mtp_core.plugins.selection import ComponentSelector

VERSION = DatasetVersion(name="words", version="1", sha256="0" * 64)


def example(name="e", problem="p", prompt="ask", response="answer", reward=1.0):
    return Example(example_id=name, problem_id=problem, prompt=prompt, response=response, reward=reward)


def problem(name):
    return Problem(problem_id=name, prompt="", entry_point="", tests="")


class Source(DataSource):
    def __init__(self, version=VERSION, problems=None, policy=None, **examples):
        self.own, self.found, self.judged, self.policy = version, examples, problems or {}, policy

    def examples(self, split):
        return self.found.get(split, [])

    def policy_examples(self, split):
        return super().policy_examples(split) if self.policy is None else self.policy.get(split, [])

    def problems(self, split):
        return self.judged.get(split, [])

    def version(self):
        return self.own


@pytest.fixture(scope="module")
def component():
    return ComponentSelector().select(Kind.DATA, "core.jsonl", options={})


@pytest.fixture
def check(component, tmp_path):
    return lambda source: check_examples(source, VERSION, component, storage=tmp_path)


@pytest.mark.parametrize(
    ("version", "fault"),
    [
        ("1", "returned str, expected a `DatasetVersion`"),
        (attrs.evolve(VERSION, sha256="abc"), "returned the `sha256` 'abc', expected 64 hexadecimal digits"),
        (attrs.evolve(VERSION, sha256=None), "returned the `sha256` None, expected 64 hexadecimal digits"),
        (attrs.evolve(VERSION, name="../up"), "returned a version that cannot name a folder: each part of"),
        (attrs.evolve(VERSION, version=3), "returned a version that cannot name a folder"),
    ],
)
def test_a_version_that_is_none_is_refused(component, version, fault):
    with pytest.raises(WmtpError) as caught:
        checked_version(Source(version), component)

    assert f"{component.plugin}, `core.jsonl`, `version`: {fault}" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (
            Source(train=[example("e")], test=[example("e", problem="q")]),
            "split `test`: two examples have the id `e`",
        ),
        (
            Source(train=[example("a")], test=[example("b")]),
            "split `test`: problem `p` is in both `train` and `test`",
        ),
        (
            Source(train=[example("a")], policy={"test": [example("b")]}),
            "split `test`: problem `p` is in both `train` and `test`",
        ),
        (
            Source(train=[example("a")], problems={"test": [problem("p")]}),
            "split `test`: problem `p` is in both `train` and `test`",
        ),
        (
            Source(problems={"test": [problem("p"), problem("p")]}),
            "split `test`: two problems have the id `p`",
        ),
        (
            Source(train=[example("a"), example("b", prompt="another")]),
            "split `train`: problem `p` has different prompts in the examples `a` and `b`",
        ),
        (Source(train=["text"]), "split `train`: item 0 is of the type `str`, expected `Example`"),
        (Source(train=7), "split `train`: TypeError: 'int' object is not iterable"),
    ],
)
def test_faults_name_plugin_distribution_and_version(check, component, source, fault):
    with pytest.raises(WmtpError) as caught:
        check(source)

    assert str(caught.value) == f"{component.plugin}, `core.jsonl`, {fault}"


def test_good_data_have_no_warnings(check):
    source = Source(
        train=[
            example("a"),
            example("b", response="no", reward=0.0),
            example("c", response="no", reward=0.0),
        ],
        test=[example("d", problem="q")],
        problems={"test": [problem("q")]},
    )

    assert check(source) == []


def test_blank_and_contradicting_responses_are_counted_and_named_once_and_for_all(check):
    blank = [example(f"blank{n}", response=" \n") for n in range(7)]
    labels = [example("right"), example("wrong", reward=0.0), example("other", problem="q", reward=0.0)]
    blanks, contradiction = check(Source(train=[*blank, *labels]))

    assert blanks == (
        "WARNING: data source `core.jsonl`: 7 responses are blank: `blank0`, `blank1`, `blank2`, `blank3`, "
        "`blank4` and 2 more"
    )
    assert contradiction.endswith("2 examples have the text of one with another label: `right`, `wrong`")
    assert check(Source(train=[example("never read"), example("never read")])) == [blanks, contradiction]
