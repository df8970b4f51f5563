"""Judge a response by the number that it states as its answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from decimal import Decimal

from attrs import define
from weighted_mtp_core.api import Problem, Verdict, VerdictKind

from weighted_mtp_code_tasks.judging import Attempts, Judge, Judgement

MARK = "####"
_NEXT_QUESTION = re.compile(r"\n\s*Question:")
# LaTeX's spacing, narrow and no-break spaces may separate thousands; ordinary spaces separate numbers.
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\[,;:! ]|[\u00a0\u2007\u2009\u202f])(?=\d{3}(?!\d))")
_CURRENCY = (
    r"(?:(?:US|HK|NT|[ACRS])(?=\$)|(?:Rs|Rp|RM|Tk|kr|USD|EUR|GBP|INR|CAD|AUD|CHF|JPY|CNY)\.?)?"
    r"(?:\\?[$\u00a2-\u00a5\u20a0-\u20cf])?"
)
# A sign directly after a letter, digit or dot belongs to no number: `2-3` is two numbers without a sign.
_NUMBER = re.compile(
    rf"(?<![\w.])([-\u2212]?){_CURRENCY}\s?([-\u2212]?)((?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?|\.\d+)"
)
_TITLE = re.compile(r"(?:(?:the )?(?:final )?answer(?: is)? ?){0,2}(?:boxed)?", re.IGNORECASE)
_STEP = re.compile(r"[\W_]*(?:step|part|case)\s*\d", re.IGNORECASE)
_COUNTED = re.compile(r"[\W_]*\d+[.)]\s+[^\W\d]")
_LONGEST = 40  # characters of a number; no answer is longer, but a model may write thousands of digits


def final_number(text: str) -> Decimal | None:
    r"""Return the number that a response states as its answer; None if the response contains no number.

    The answer is the number after the last `####` that marks an answer and not a heading. Without this mark,
    the answer is the first number after the last `\boxed{`; without such a number, it is the last number. If
    a later line of the response begins with `Question:`, the text from there on is ignored. Thousands may be
    separated by commas, LaTeX such as `{,}` and `\,`, or narrow or no-break spaces. A currency, a percent
    sign or a full stop is ignored, and so is a number of more than 40 characters.
    """
    text, marked = _answer(text)
    if marked is not None:
        return marked
    numbers = _numbers(text)
    boxed = _numbers(text.rpartition("\\boxed{")[2])[:1] if "\\boxed{" in text else []
    return next(iter(boxed or numbers[-1:]), None)


def cut_answer(text: str) -> str:
    """Return the text up to the end of its answer; the final number of the result is the same.

    Without a `####` that marks an answer, return the text up to the next question or to its end.
    """
    return _answer(text)[0]


def _answer(text: str) -> tuple[str, Decimal | None]:
    """Return the text up to the end of its answer, and the number after the `####` that marks the answer.

    Without such a mark, return the text up to the next question or to its end, and None.
    """
    text = _NEXT_QUESTION.split(text, maxsplit=1)[0]
    end = text.rfind(MARK)
    while end >= 0:
        rest = text[end + len(MARK) :]
        plain = _THOUSANDS.sub(",", rest)
        match = next(_matches(plain), None)
        if match is not None and _is_answer(plain, title=plain[: match.start()]):
            lines = rest.split("\n")[: plain[: match.end()].count("\n") + 1]
            return text[: end + len(MARK)] + "\n".join(lines) + "\n", _number(match)
        end = text.rfind(MARK, 0, end)
    return text, None


def _is_answer(marked: str, *, title: str) -> bool:
    """Return whether a `####` marks an answer and not a Markdown heading.

    Args:
        marked: The text after `####`.
        title: The beginning of this text, up to its first number.
    """
    is_last = not marked.partition("\n")[2].strip()
    if _STEP.match(marked) or (_COUNTED.match(marked) and not is_last):
        return False
    words = re.sub(r"[\W_]+", " ", title).strip()
    return _TITLE.fullmatch(words) is not None or (is_last and "\n" not in title)


def _numbers(text: str) -> list[Decimal]:
    return [_number(match) for match in _matches(_THOUSANDS.sub(",", text))]


def _matches(text: str) -> Iterator[re.Match[str]]:
    return (match for match in _NUMBER.finditer(text) if len(match[3]) <= _LONGEST)


def _number(match: re.Match[str]) -> Decimal:
    return Decimal(("-" if match[1] or match[2] else "") + match[3].replace(",", ""))


@define(kw_only=True)
class NumberJudge(Judge):
    """Compares the final number of a response with the number in `Problem.tests`; no program is run."""

    def completion(self, problem: Problem, text: str) -> str:  # noqa: ARG002 - the same for every problem
        """Return the text up to and including its answer; models often continue with further questions."""
        return cut_answer(text)

    def judge(
        self,
        attempts: Attempts,
        *,
        on_done: Callable[[], None] | None = None,
        executor: Executor | None = None,  # noqa: ARG002 - sending a number takes longer than comparing it
    ) -> Judgement:
        """Compare the numbers exactly, in this process."""
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
