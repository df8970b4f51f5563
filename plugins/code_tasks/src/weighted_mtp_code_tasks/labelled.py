"""Responses that are labelled by judging them, and stored with their verdicts under `datasets_v2/`.

The responses in the data are judged exactly like a policy's completions. The origin of a response, such as
`mutant` for a changed solution, is recorded, but the origin is never used as the label.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
from attrs import define, field
from weighted_mtp_core.api import (
    DatasetVersion,
    DataSource,
    Example,
    Problem,
    Split,
    StoredDataset,
    Verdict,
    WmtpError,
    is_correct,
    store_dataset,
)

from weighted_mtp_code_tasks.judging import Judge
from weighted_mtp_code_tasks.labelling import (
    LabelledProblem,
    judge_all,
    sha256_of_tests,
    statistics,
    with_a_solution,
)

_FORMAT = 2
PROBLEMS, EXAMPLES = "problems.jsonl", "examples.jsonl"
STATISTICS, PROVENANCE = "statistics.json", "provenance.json"


@define(kw_only=True, eq=False, slots=False)
class LabelledSource(DataSource):
    """A data source of judged responses.

    Attributes:
        name: Name of the data and of their folder under `datasets_v2/`.
        recipe: Everything on which the responses depend, as JSON values; not the recipe of a run. The version
            of the data is a hash of `recipe`, of the format of the files, and of those limits of the judge
            that differ from their defaults.
        draw: Makes the problems and the responses; called only if the labelled data are not in storage.
        storage: Root folder of the storage.
        judge: Judges responses and completions.
        executor: Passed to `Judge.judge` for the responses; None judges them on this machine.
        incorrect_fraction: Share of incorrect responses among the training examples of the policy.
        tolerated_failures: Largest share of problems that may have no solution that passes the tests; such
            problems are left out.

    Raises:
        WmtpError: There are no problems; the share of problems without a solution that passes the tests is
            larger than `tolerated_failures`, or no problem has such a solution; the files in storage were
            changed; or `draw` or `Judge.judge` raises an error.
    """

    name: str
    recipe: Mapping[str, Any]
    draw: Callable[[], list[LabelledProblem]]
    storage: Path
    judge: Judge
    executor: Executor | None = None
    incorrect_fraction: float = 0.0
    tolerated_failures: float = 0.02
    _stored: StoredDataset = field(init=False)

    def __attrs_post_init__(self) -> None:
        limits = self.judge.limits()
        depends_on = {"format": _FORMAT, **self.recipe, **({"limits": limits} if limits else {})}
        recipe = json.dumps(depends_on, sort_keys=True)
        version = hashlib.sha256(recipe.encode()).hexdigest()[:12]
        self._stored = store_dataset(self.storage, name=self.name, version=version, write=self._write)

    @property
    def folder(self) -> Path:
        """The folder with the labelled data."""
        return self._stored.folder

    def version(self) -> DatasetVersion:
        """Return the name of the data, their version, and the SHA-256 of the manifest in their folder."""
        return self._stored.version

    def examples(self, split: Split) -> Sequence[Example]:
        """Return the examples of the split, which are labelled responses."""
        return self._examples[split]

    def policy_examples(self, split: Split) -> Sequence[Example]:
        """Return all correct examples of the split and, for training, also incorrect examples.

        The share of incorrect examples is `incorrect_fraction`. The incorrect examples are taken at equal
        intervals from the list of all incorrect examples.

        Raises:
            WmtpError: There are fewer incorrect examples than `incorrect_fraction` requires.
        """
        examples = self._examples[split]
        right = [example for example in examples if is_correct(example.reward)]
        if split != "train" or self.incorrect_fraction == 0:
            return right
        wrong = [example for example in examples if not is_correct(example.reward)]
        wanted = round(len(right) * self.incorrect_fraction / (1 - self.incorrect_fraction))
        if wanted > len(wrong):
            raise WmtpError(
                f"`incorrect_fraction = {self.incorrect_fraction}` needs {wanted} wrong responses for "
                f"{len(right)} right ones, but there are {len(wrong)}",
                hint="lower it, or raise the option `mutants` or `incorrect`, if the data source has one",
            )
        return right + [wrong[i * len(wrong) // wanted] for i in range(wanted)]

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return the problems of the split."""
        return [Problem(**row["problem"]) for row in self._rows(PROBLEMS) if row["split"] == split]

    def completion(self, problem: Problem, text: str) -> str:
        """Return the part of a policy's text that is judged."""
        return self.judge.completion(problem, text)

    def verify(self, attempts: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Judge completions by the same method as the labelled responses, on the cores of this machine."""
        return self.judge.judge(attempts).verdicts

    @cached_property
    def _examples(self) -> Mapping[Split, list[Example]]:
        found: dict[Split, list[Example]] = {"train": [], "validation": [], "test": []}
        for row in self._rows(EXAMPLES):
            found[row["split"]].append(_example(row["example"]))
        return found

    def _rows(self, file: str) -> list[dict[str, Any]]:
        text = (self.folder / file).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]

    # ----------------------------------------------------------------- preparation

    def _write(self, folder: Path) -> None:
        judged, provenance = judge_all(
            self.draw(), self.judge, executor=self.executor, title=f"labelling {self.name}"
        )
        kept = with_a_solution(judged, name=self.name, tolerated=self.tolerated_failures)
        problems = [{"split": one.split, "problem": attrs.asdict(one.problem)} for one in kept]
        _write_rows(folder / PROBLEMS, problems)
        _write_rows(folder / EXAMPLES, [row for one in kept for row in one.rows()])
        _write_json(folder / STATISTICS, statistics(judged, kept=kept))
        _write_json(
            folder / PROVENANCE,
            {
                "recipe": dict(self.recipe),
                "sandbox": dict(provenance),
                "tests_sha256": sha256_of_tests([one.problem for one in kept]),
            },
        )


def _example(row: Mapping[str, Any]) -> Example:
    """Return an example from its JSON form, in which spans are lists and not tuples."""
    spans = row.get("spans")
    return Example(**{**row, "spans": None if spans is None else tuple(map(tuple, spans))})


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
