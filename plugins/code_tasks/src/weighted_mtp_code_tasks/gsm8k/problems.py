"""Read GSM8K from its public files, or from files that also contain solutions of models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import attrs
from attrs import frozen
from weighted_mtp_core.api import Problem, ProblemIds, Record, Split, read_records, text_field

from weighted_mtp_code_tasks.gsm8k.numbers import final_number
from weighted_mtp_code_tasks.labelling import Candidate, LabelledProblem

FORMAT = 2
"""Part of the version of the data; raise it if the code makes other responses from the same files."""


@frozen(kw_only=True)
class Shares:
    """Shares of the questions of a file in the splits `validation` and `test`; the others are for training.

    The hash of a question decides its split.
    """

    validation: float
    test: float


@frozen(kw_only=True)
class Row:
    """A question, its reference answer, and further answers (`written`), which are not judged yet."""

    question: str
    answer: str
    written: tuple[str, ...]


def read_problems(files: Mapping[Path, Shares]) -> list[LabelledProblem]:
    """Return each question once, with the answers of all its records.

    If a question is in several files, the shares of the first of these files decide its split.

    Raises:
        WmtpError: A file is missing or malformed, or two records of a question have reference answers with
            different final numbers.
    """
    found: dict[str, Row] = {}
    splits: dict[str, Split] = {}
    ids = ProblemIds()
    for path, shares in files.items():
        for row in read_records(
            path, _row, check=lambda row, place: ids.add(_name(row), place, answer=final_number(row.answer))
        ):
            name = _name(row)
            splits.setdefault(name, _split(row, shares))
            known = found.get(name)
            more = () if known is None else (*known.written, row.answer)
            found[name] = attrs.evolve(known or row, written=(*more, *row.written))
    return [_problem(row, name, splits[name]) for name, row in found.items()]


def _name(row: Row) -> str:
    return f"gsm8k/{hashlib.sha256(row.question.encode()).hexdigest()[:12]}"


def _split(row: Row, shares: Shares) -> Split:
    share = int.from_bytes(hashlib.sha256(row.question.encode()).digest()[-8:], "big") / 2**64
    if share < shares.test:
        return "test"
    return "validation" if share < shares.test + shares.validation else "train"


def _row(record: Record) -> Row:
    answer = text_field(record, "ground_truth" if "ground_truth" in record else "answer")
    if final_number(answer) is None:
        raise ValueError("the answer has no number")
    solutions = record.get("solutions") or []
    if not isinstance(solutions, list) or not all(isinstance(each, dict) for each in solutions):
        raise ValueError("`solutions` must be a list of objects")
    return Row(
        question=text_field(record, "question").strip(),
        answer=_response(answer),
        written=tuple(
            _response(written) for each in solutions if (written := text_field(each, "solution")).strip()
        ),
    )


def _response(answer: str) -> str:
    return answer.strip() + "\n"


def _problem(row: Row, name: str, split: Split) -> LabelledProblem:
    candidates = [Candidate(response=row.answer, made="solution")]
    candidates += [
        Candidate(response=each, made="sample") for each in dict.fromkeys(row.written) if each != row.answer
    ]
    return LabelledProblem(
        problem=Problem(
            problem_id=name,
            prompt=f"Question: {row.question}\nAnswer:\n",
            entry_point="",
            tests=str(final_number(row.answer)),
            solution=row.answer,
        ),
        split=split,
        candidates=tuple(candidates),
    )
