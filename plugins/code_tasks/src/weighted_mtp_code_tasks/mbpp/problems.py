"""Read MBPP from its public file, make broken variants of its solutions, and add programs of models."""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen
from weighted_mtp_core.api import (
    Problem,
    ProblemIds,
    Record,
    Split,
    int_field,
    read_records,
    text_field,
    text_list_field,
)

from weighted_mtp_code_tasks.completion import parsed
from weighted_mtp_code_tasks.labelling import Candidate, LabelledProblem
from weighted_mtp_code_tasks.mutation import mutants

FORMAT = 1
"""Part of the version of the data; raise it if the code makes other programs from the same files."""


@frozen(kw_only=True)
class Row:
    """A problem as published; its `task_id` decides its split, as in Austin et al. 2021."""

    task_id: int
    text: str
    code: str
    tests: tuple[str, ...]
    setup: str
    entry_point: str

    @property
    def split(self) -> Split | None:
        """The split in Austin et al. 2021; None for the ten problems that were used as prompts."""
        if self.task_id <= 10:
            return None
        if self.task_id <= 510:
            return "test"
        return "validation" if self.task_id <= 600 else "train"

    @property
    def prompt(self) -> str:
        """A docstring with the task and with its tests, which contain the name of the function."""
        inside = "\n".join([self.text.strip(), *self.tests]).replace('"""', "'''")
        return f'"""\n{inside}\n"""\n'


def read_problems(
    path: Path, *, samples: Path | None, mutants_per_solution: int, seed: int
) -> list[LabelledProblem]:
    """Return the problems with correct and broken solutions, and with the programs of models in `samples`.

    The ten problems without a split are left out. The correct solution is included as published. If
    `mutants_per_solution` is above 0, the correct solution is also included in the layout of `ast.unparse`,
    which broken solutions have.

    Raises:
        WmtpError: A file is missing or malformed, two problems have the same `task_id`, or the `task_id` of a
            sample belongs to no problem.
    """
    ids = ProblemIds()
    rows = read_records(path, _row, check=lambda row, place: ids.add_new(str(row.task_id), place))
    written = _samples(samples, {row.task_id for row in rows})
    return [
        _problem(row, split, written[row.task_id], mutants_per_solution=mutants_per_solution, seed=seed)
        for row in rows
        if (split := row.split) is not None
    ]


def _row(record: Record) -> Row:
    code, tests = text_field(record, "code"), text_list_field(record, "test_list")
    return Row(
        task_id=int_field(record, "task_id"),
        text=text_field(record, "text"),
        code=code.rstrip() + "\n",
        tests=tuple(tests),
        setup=text_field(record, "test_setup_code"),
        entry_point=_entry_point(code, tests),
    )


def _entry_point(code: str, tests: Sequence[str]) -> str:
    """Return the name of the last function in the solution that the tests call."""
    program, asserts = parsed(code), parsed("\n".join(tests))
    if program is None or asserts is None:
        raise ValueError(f"`{'code' if program is None else 'test_list'}` is not valid Python")
    called = {
        node.func.id
        for node in ast.walk(asserts)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    defined = [node.name for node in program.body if isinstance(node, ast.FunctionDef)]
    found = [name for name in defined if name in called]
    if not found:
        raise ValueError("`test_list` calls no function that `code` defines")
    return found[-1]


def _samples(path: Path | None, known: set[int]) -> defaultdict[int, list[str]]:
    """Return the programs of models by `task_id`; other keys of the file, such as verdicts, are ignored."""
    found: defaultdict[int, list[str]] = defaultdict(list)

    def add(record: Record) -> None:
        task_id, program = int_field(record, "task_id"), text_field(record, "program")
        if task_id not in known:
            raise ValueError(f"no problem has the task_id `{task_id}`")
        if program.strip():
            found[task_id].append(program.rstrip() + "\n")

    if path is not None:
        read_records(path, add)
    return found


def _problem(
    row: Row, split: Split, samples: Sequence[str], *, mutants_per_solution: int, seed: int
) -> LabelledProblem:
    generator = random.Random(f"{seed}/{row.task_id}")  # noqa: S311 - data, not secrets
    candidates = [Candidate(response=row.code, made="solution")]
    broken: list[str] = []
    tree = parsed(row.code)
    if tree is not None and mutants_per_solution:
        candidates.append(Candidate(response=_spelt(tree.body), made="solution"))
        broken = [_spelt(mutant) for mutant in mutants(tree.body, generator, count=mutants_per_solution)]
    candidates += [Candidate(response=each, made="mutant") for each in broken]
    candidates += [Candidate(response=each, made="sample") for each in samples]
    unique = {candidate.response: candidate for candidate in reversed(candidates)}
    return LabelledProblem(
        problem=Problem(
            problem_id=f"mbpp/{row.task_id}",
            prompt=row.prompt,
            entry_point=row.entry_point,
            tests="\n".join([row.setup, *row.tests]),
            solution=row.code,
        ),
        split=split,
        candidates=tuple(each for each in candidates if unique[each.response] is each),
    )


def _spelt(body: list[ast.stmt]) -> str:
    return ast.unparse(ast.fix_missing_locations(ast.Module(body=body, type_ignores=[]))) + "\n"
