"""Programs labelled by running them, kept with their verdicts under `datasets_v2/` and checked when read.

Right and broken candidates of a problem go through the same sandbox as everything a policy writes; how a
candidate was made is recorded, but never is its label.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import attrs
from attrs import define, field, frozen
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from weighted_mtp_core.api import (
    DatasetVersion,
    DataSource,
    Example,
    Problem,
    Split,
    Verdict,
)
from weighted_mtp_core.builtin.judging import Judge
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.storage.manifest import MANIFEST, atomic_folder, verify_manifest

_FORMAT = 1
Made = Literal["solution", "mutant", "sample"]


@frozen(kw_only=True)
class Candidate:
    """A response before it is judged, and where it comes from: a solution, one that was broken, a model."""

    response: str
    made: Made


@frozen(kw_only=True)
class LabelledProblem:
    """A problem, its split, and what is to be judged for it."""

    problem: Problem
    split: Split
    candidates: tuple[Candidate, ...]


@define(kw_only=True, eq=False, slots=False)
class LabelledSource(DataSource):
    """A data source of executed programs.

    Attributes:
        name: Of the data, and of its folder under `datasets_v2/`.
        recipe: What the programs depend on; its hash is the version.
        draw: Makes problems and candidates; only called when the folder is not there yet.
        storage: The storage root.
        judge: Gives responses their labels.
        incorrect_fraction: Share of wrong responses among what the policy imitates.
    """

    name: str
    recipe: Mapping[str, Any]
    draw: Callable[[], list[LabelledProblem]]
    storage: Path
    judge: Judge
    incorrect_fraction: float = 0.0
    _sha256: str = field(init=False, default="")

    def __attrs_post_init__(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.with_name(f"{self.folder.name}.lock")):
            if not (self.folder / MANIFEST).is_file():
                self._prepare()
        self._sha256 = verify_manifest(self.folder)

    @property
    def folder(self) -> Path:
        """Where the labelled data lies."""
        return self.storage / "datasets_v2" / self.name / self._version

    @property
    def _version(self) -> str:
        text = json.dumps({"format": _FORMAT, **self.recipe}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def version(self) -> DatasetVersion:
        """Return name, version and the SHA-256 of the folder's manifest."""
        return DatasetVersion(name=self.name, version=self._version, sha256=self._sha256)

    def examples(self, split: Split) -> Sequence[Example]:
        """Return every labelled response of the split."""
        return self._examples[split]

    def policy_examples(self, split: Split) -> Sequence[Example]:
        """Return the right responses; in training, mixed with `incorrect_fraction` of wrong ones.

        The wrong ones are evenly spread over those there are, in the data's order.

        Raises:
            WmtpError: There are not enough wrong responses for the fraction.
        """
        examples = self._examples[split]
        right = [example for example in examples if example.reward >= 1]
        if split != "train" or self.incorrect_fraction == 0:
            return right
        wrong = [example for example in examples if example.reward < 1]
        wanted = round(len(right) * self.incorrect_fraction / (1 - self.incorrect_fraction))
        if wanted > len(wrong):
            raise WmtpError(
                f"`incorrect_fraction = {self.incorrect_fraction}` needs {wanted} wrong responses beside "
                f"{len(right)} right ones, but there are {len(wrong)}",
                hint="lower it, or raise `data.options.mutants`",
            )
        return right + [wrong[i * len(wrong) // wanted] for i in range(wanted)]

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return the problems of the split."""
        return [Problem(**row["problem"]) for row in self._rows("problems.jsonl") if row["split"] == split]

    def completion(self, problem: Problem, text: str) -> str:
        """Return what counts of a text, without fences and talk."""
        return self.judge.completion(problem, text)

    def verify(self, attempts: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Judge completions as the labelled responses were."""
        return self.judge.judge(attempts).verdicts

    @cached_property
    def _examples(self) -> Mapping[Split, list[Example]]:
        found: dict[Split, list[Example]] = {"train": [], "validation": [], "test": []}
        for row in self._rows("examples.jsonl"):
            found[row["split"]].append(Example(**row["example"]))
        return found

    def _rows(self, file: str) -> list[dict[str, Any]]:
        lines = (self.folder / file).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    # ----------------------------------------------------------------- preparation

    def _prepare(self) -> None:
        drawn = self.draw()
        verdicts, provenance = _judge_all(drawn, self.judge, title=f"labelling {self.name}")
        kept = [pair for pair in zip(drawn, verdicts, strict=True) if pair[1][0].passed]
        self._check_solutions(drawn, verdicts, kept_count=len(kept))
        with atomic_folder(self.folder) as folder:
            _write_rows(
                folder / "problems.jsonl",
                [{"split": one.split, "problem": attrs.asdict(one.problem)} for one, _ in kept],
            )
            _write_rows(folder / "examples.jsonl", [row for pair in kept for row in _example_rows(*pair)])
            _write_json(folder / "statistics.json", _statistics(drawn, verdicts))
            _write_json(
                folder / "provenance.json", {"recipe": dict(self.recipe), "sandbox": dict(provenance)}
            )

    def _check_solutions(
        self, drawn: Sequence[LabelledProblem], verdicts: Sequence[Sequence[Verdict]], *, kept_count: int
    ) -> None:
        """Refuse data whose own solutions fail: then the tests or the sandbox are wrong, not the programs."""
        failed = [
            (one.problem.problem_id, row[0])
            for one, row in zip(drawn, verdicts, strict=True)
            if not row[0].passed
        ]
        if len(failed) > 0.02 * len(drawn):
            problem_id, verdict = failed[0]
            raise WmtpError(
                f"{len(failed)} of {len(drawn)} reference solutions of `{self.name}` fail their own tests, "
                f"for example `{problem_id}`: {verdict.kind.value} {verdict.detail}",
                hint="raise the limits in `[sandbox]`, e.g. `sandbox.cpu_seconds`",
            )
        if failed:
            names = ", ".join(f"`{problem_id}`" for problem_id, _ in failed)
            Console(stderr=True).print(
                f"WARNING: {self.name} leaves out {names}: the reference solution fails its own tests; "
                f"{kept_count} problems stay",
                markup=False,
            )


def _judge_all(
    drawn: Sequence[LabelledProblem], judge: Judge, *, title: str
) -> tuple[list[list[Verdict]], Mapping[str, str]]:
    """Judge every candidate; return the verdicts problem by problem, and what they depend on."""
    attempts = [(one.problem, candidate.response) for one in drawn for candidate in one.candidates]
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{title}: {len(attempts)} responses", highlight=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=len(attempts))
        judgement = judge.judge(attempts, on_done=lambda: progress.advance(task))
    flat = iter(judgement.verdicts)
    return [[next(flat) for _ in one.candidates] for one in drawn], judgement.provenance


def _example_rows(one: LabelledProblem, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Return a problem's labelled responses; a verdict that says nothing about the program is no label."""
    return [
        {
            "split": one.split,
            "made": candidate.made,
            "verdict": verdict.kind.value,
            "example": attrs.asdict(
                Example(
                    example_id=f"{one.problem.problem_id}/{number}",
                    problem_id=one.problem.problem_id,
                    prompt=one.problem.prompt,
                    response=candidate.response,
                    reward=1.0 if verdict.passed else 0.0,
                )
            ),
        }
        for number, (candidate, verdict) in enumerate(zip(one.candidates, verdicts, strict=True))
        if verdict.is_label
    ]


def _statistics(
    drawn: Sequence[LabelledProblem], verdicts: Sequence[Sequence[Verdict]]
) -> dict[str, dict[str, int]]:
    """Count problems by split, and verdicts by how the program was made."""
    made: dict[str, Counter[str]] = {name: Counter() for name in get_args(Made)}
    for one, row in zip(drawn, verdicts, strict=True):
        for candidate, verdict in zip(one.candidates, row, strict=True):
            made[candidate.made][verdict.kind.value] += 1
    splits: Counter[str] = Counter(one.split for one in drawn)
    return {"problems": dict(splits), **{kind: dict(counter) for kind, counter in made.items()}}


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
