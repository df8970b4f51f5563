"""Judge a response by its final number."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from attrs import define
from weighted_mtp_core.api import Problem, Verdict, VerdictKind

from weighted_mtp_code_tasks.judging import Attempts, Judge, Judgement

MARK = "####"
# A sign counts if no word or number precedes it: `2-3` is two numbers without a sign.
_NUMBER = re.compile(
    r"(?<![\w.])([-\u2212]?)[$€£]?\s?([-\u2212]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
)
_LONGEST = 40  # digits; no answer has more, but a model may write thousands


def final_number(text: str) -> Decimal | None:
    """Return the first number after the last `####`, else the last number; None if there is none.

    Thousands may have commas. A currency, a `%` or a full stop after the number does not matter.
    """
    _, mark, answer = text.rpartition(MARK)
    marked = _numbers(answer)[:1] if mark else []
    found = marked or _numbers(text)[-1:]
    return found[0] if found else None


def _numbers(text: str) -> list[Decimal]:
    return [
        Decimal(("-" if one or other else "") + digits.replace(",", ""))
        for one, other, digits in _NUMBER.findall(text)
        if len(digits) <= _LONGEST
    ]


@define(kw_only=True)
class NumberJudge(Judge):
    """Compares the final number of a response with `Problem.tests`, which is a number; runs nothing."""

    def completion(self, problem: Problem, text: str) -> str:  # noqa: ARG002 - the same for every problem
        """Return the text up to its answer; models often continue with further questions."""
        text = re.split(r"\n\s*Question:", text, maxsplit=1)[0]
        before, mark, answer = text.partition(MARK)
        return before + mark + answer.split("\n", 1)[0] + "\n" if mark else text

    def judge(self, attempts: Attempts, *, on_done: Callable[[], None] | None = None) -> Judgement:
        """Compare numbers exactly."""
        verdicts = []
        for problem, text in attempts:
            verdicts.append(_verdict(final_number(text), Decimal(problem.tests)))
            if on_done is not None:
                on_done()
        return Judgement(verdicts=verdicts, provenance={"backend": "final number"})


def _verdict(found: Decimal | None, wanted: Decimal) -> Verdict:
    if found is None:
        return Verdict(kind=VerdictKind.WRONG, detail="there is no number")
    if found == wanted:
        return Verdict(kind=VerdictKind.PASSED)
    return Verdict(kind=VerdictKind.WRONG, detail=f"expected {wanted}, got {found}")
