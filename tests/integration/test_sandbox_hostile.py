"""Hostile, broken and honest programs, each with its right verdict, in every back end of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import frozen
from weighted_mtp_core.api import SandboxSettings, Verdict, VerdictKind
from weighted_mtp_core.evaluation.sandbox import Job, Sandbox, available_backends

PROGRAMS = Path(__file__).parent.parent / "programs"
COLLECTIONS = ("forged", "escapes", "bombs", "broken", "honest")
TESTS = """
def check(candidate):
    assert candidate(3) == 9
    assert candidate(-7) == 49
    assert candidate(0) == 0
"""
SETTINGS = {"cpu_seconds": 0.7, "wall_seconds": 3.0, "memory_mb": 256, "workers": 2}


@frozen
class Case:
    collection: str
    name: str
    expected: frozenset[VerdictKind]
    job: Job


def read_cases(collection: str) -> Iterator[Case]:
    text = (PROGRAMS / f"{collection}.txt").read_text(encoding="utf-8")
    for block in re.split(r"^=== ", text, flags=re.MULTILINE)[1:]:
        title, _, body = block.partition("\n")
        name, _, verdicts = title.rpartition(": ")
        program, _, tests = body.partition("--- tests\n")
        expected = frozenset(VerdictKind(each) for each in verdicts.split("|"))
        yield Case(collection, name, expected, Job(program, "square", tests or TESTS))


CASES = [case for collection in COLLECTIONS for case in read_cases(collection)]
SPECIAL = [
    Case("honest", name, frozenset({VerdictKind.PASSED}), Job(program, "square", TESTS))
    for name, program in (
        ("lines that end as on Windows", "def square(n):\r\n    return n * n\r\n"),
        ("tabs", "def square(n):\n\treturn n * n"),
        ("a coding line that lies", "# -*- coding: latin-1 -*-\ndef square(é):\n    return é * é\n"),
    )
] + [
    Case("broken", name, frozenset({VerdictKind.ERROR}), Job(program, "square", TESTS))
    for name, program in (
        ("a byte order mark", "\ufeffdef square(n):\n    return n * n\n"),
        ("a null byte", "def square(n):\n    return n * n\0"),
        ("half a surrogate pair", "def square(n):\n    return '\ud800' and n * \ud800n\n"),
    )
]
ALL = CASES + SPECIAL


def backend(name: str) -> object:
    status = next(each for each in available_backends() if each.name == name)
    return pytest.param(name, marks=pytest.mark.skipif(not status.available, reason=status.detail))


@pytest.fixture(scope="module", params=[backend("landlock"), backend("bubblewrap")])
def verdicts(request: pytest.FixtureRequest) -> dict[str, Verdict]:
    with Sandbox(SandboxSettings(backend=request.param, **SETTINGS), judge_errors_tolerated=1000) as sandbox:
        judged = sandbox.judge([case.job for case in ALL])
    return {case.name: verdict for case, verdict in zip(ALL, judged, strict=True)}


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.collection}: {case.name}")
def test_a_program_gets_its_right_verdict(case: Case, verdicts: dict[str, Verdict]) -> None:
    verdict = verdicts[case.name]

    assert verdict.kind in case.expected, verdict


def test_the_collections_are_as_large_as_promised() -> None:
    honest = [case for case in ALL if case.collection == "honest"]

    assert len(ALL) - len(honest) >= 40
    assert len(honest) >= 15
    assert len({case.name for case in ALL}) == len(ALL)


def test_a_detail_is_one_printable_line(verdicts: dict[str, Verdict]) -> None:
    for name, verdict in verdicts.items():
        assert verdict.detail.isprintable(), name
        assert len(verdict.detail) <= 300, name
