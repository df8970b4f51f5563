"""Conformance to core of the data sources that read public files."""

import gzip
import json

import pytest
from weighted_mtp_core.api import BuildContext, WmtpError, read_records
from weighted_mtp_core.testing import DataSourceSuite


def mbpp(number):
    return {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(n):\n    return n + {number}",
        "test_setup_code": "",
        "test_list": [f"assert add(1) == {number + 1}"],
        "challenge_test_list": [],
    }


def gsm8k(number):
    return {"question": f"What is 1 more than {number}?", "answer": f"One more.\n#### {number + 1}"}


def contest(number):
    tests = {"input": [f"{number}\n"], "output": [f"{number + 1}\n"]}
    return {
        "name": f"problem {number}",
        "description": "Add one.",
        "public_tests": tests,
        "private_tests": {"input": [], "output": []},
        "generated_tests": {"input": [], "output": []},
        "solutions": {"language": [3], "solution": ["print(int(input()) + 1)"]},
        "incorrect_solutions": {"language": [3], "solution": ["print(input())"]},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("public")


@pytest.fixture(scope="module")
def write(folder):
    def write_rows(name, rows):
        path = folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows


class PublicFileSuite(DataSourceSuite):
    @pytest.fixture
    def context(self, folder):
        """Return a context with a storage that all tests share, so each data set is labelled only once."""
        return BuildContext(seed=7, storage=folder)


class TestMbpp(PublicFileSuite):
    address = "code_tasks.mbpp"

    @pytest.fixture
    def options(self, write):
        return {"path": write("mbpp.jsonl", [mbpp(n) for n in (11, 511, 601, 602)]), "mutants": 1}

    @pytest.fixture
    def changed_options(self, write):
        return {"path": write("other_mbpp.jsonl", [mbpp(n) for n in (12, 511, 601, 602)]), "mutants": 1}


class TestGsm8k(PublicFileSuite):
    address = "code_tasks.gsm8k"

    @pytest.fixture
    def options(self, write):
        return {"path": write("gsm8k.jsonl", [gsm8k(n) for n in range(60)])}

    @pytest.fixture
    def changed_options(self, write):
        return {"path": write("other_gsm8k.jsonl", [gsm8k(n) for n in range(59)])}


class TestCodeContests(PublicFileSuite):
    address = "code_tasks.code_contests"

    @pytest.fixture
    def options(self, write):
        splits = enumerate(("train", "validation", "test"))
        return {split: [write(f"{split}.jsonl", [contest(number)])] for number, split in splits}

    @pytest.fixture
    def changed_options(self, options):
        return {**options, "incorrect": 0}


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-12], lambda whole: whole[:10] + b"\xff" + whole[11:]]
)
def test_a_damaged_compressed_file_is_named(tmp_path, damage):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damage(gzip.compress(json.dumps({"text": "x" * 999}).encode())))

    with pytest.raises(WmtpError, match=r"cannot read `.*rows\.jsonl\.gz`: "):
        read_records(path, dict)
