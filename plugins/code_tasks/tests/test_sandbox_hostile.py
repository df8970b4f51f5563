"""Hostile, broken and honest programs get their expected verdicts in every back end of this machine."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import frozen
from weighted_mtp_core.api import Verdict, VerdictKind

from weighted_mtp_code_tasks.sandbox import Job, Sandbox, available_backends, backends
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings

PROGRAMS = Path(__file__).parent / "programs"
COLLECTIONS = ("forged", "escapes", "bombs", "broken", "honest")
TESTS = """
def check(candidate):
    assert candidate(3) == 9
    assert candidate(-7) == 49
    assert candidate(0) == 0
"""
# Only programs whose verdict may come from a limit get short limits; others may be slow on a busy machine.
PATIENT = {"cpu_seconds": 20.0, "wall_seconds": 120.0}
HURRIED = {
    VerdictKind.CPU_LIMIT: {"cpu_seconds": 0.6, "wall_seconds": 60.0},
    VerdictKind.WALL_LIMIT: {"cpu_seconds": 20.0, "wall_seconds": 4.0},
    VerdictKind.UNENCODABLE: {"cpu_seconds": 1.0, "wall_seconds": 60.0},
    VerdictKind.JUDGE_ERROR: {"cpu_seconds": 1.0, "wall_seconds": 8.0},
}


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


QUICK = ("escapes", "honest")
CONFIGURATIONS = {
    "landlock": COLLECTIONS,
    "landlock without namespaces": QUICK,  # as in containers that forbid them
    "bubblewrap": COLLECTIONS,
}
STATUS = {each.name: each for each in available_backends()}


def limit(case: Case) -> VerdictKind | None:
    """Return the expected verdict of a case for which `HURRIED` has limits; None if there is none."""
    return next((kind for kind in HURRIED if kind in case.expected), None)


@functools.cache
def judged(configuration: str, hurried: VerdictKind | None) -> dict[str, Verdict]:
    name = configuration.split(maxsplit=1)[0]
    collections = CONFIGURATIONS[configuration]
    cases = [case for case in ALL if case.collection in collections and limit(case) == hurried]
    times = PATIENT if hurried is None else HURRIED[hurried]
    settings = SandboxSettings(backend=name, memory_mb=256, workers=4, **times)
    with pytest.MonkeyPatch.context() as patch:
        if configuration.endswith("without namespaces"):
            patch.setattr(backends, "_namespaces_work", lambda: False)
        with Sandbox(settings, judge_errors_tolerated=1000) as sandbox:
            verdicts = sandbox.judge([case.job for case in cases])
    return {case.name: verdict for case, verdict in zip(cases, verdicts, strict=True)}


@pytest.mark.parametrize(
    ("configuration", "case"),
    [
        pytest.param(
            configuration,
            case,
            id=f"{configuration}: {case.collection}: {case.name}",
            marks=pytest.mark.skipif(not status.available, reason=status.detail),
        )
        for configuration, collections in CONFIGURATIONS.items()
        for status in [STATUS[configuration.split()[0]]]
        for case in ALL
        if case.collection in collections
    ],
)
def test_a_program_gets_its_right_verdict(configuration: str, case: Case) -> None:
    verdict = judged(configuration, limit(case))[case.name]

    assert verdict.kind in case.expected, verdict
    assert verdict.detail.isprintable()
    assert len(verdict.detail) <= 300


def test_the_collections_are_as_large_as_promised() -> None:
    honest = [case for case in ALL if case.collection == "honest"]

    assert len(ALL) - len(honest) >= 40
    assert len(honest) >= 15
    assert len({case.name for case in ALL}) == len(ALL)
