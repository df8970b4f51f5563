"""Draw the problems of `code_tasks.micro_chain`, and responses whose mistakes (slips) are known."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, Literal

import attrs
from weighted_mtp_core.api import Span

from weighted_mtp_code_tasks.labelling import Candidate, LabelledProblem
from weighted_mtp_code_tasks.micro_code import generate
from weighted_mtp_code_tasks.micro_code.grammar import STEPS, Function, Kind, Step, random_function

FORMAT = f"1 of {generate.FORMAT}"
"""Part of the version of the data.

Raise the first number if the code makes other programs for the same options.
"""

_CONSTANT = re.compile(r"\d+|'[a-z]'")
_STYLES: tuple[Literal["chain", "final"], ...] = ("chain", "final")


def draw_chains(
    *,
    problems: int,
    length: int,
    kinds: Sequence[Kind],
    responses: int,
    twins: int,
    slip_rates: tuple[float, float],
    slipping_types: float,
    seed: int,
) -> list[LabelledProblem]:
    """Draw functions that are distinct in text and in behaviour, each with a solution and responses.

    The arguments are options of `MicroChainOptions`. The functions (apart from their number, `problems`)
    depend only on `kinds`, `length` and `seed`; the types of steps with frequent slips depend only on
    `kinds`, `slipping_types` and `seed`.

    Raises:
        WmtpError: Fewer than `problems` distinct functions of this length were found.
    """
    slips = {step.words: slip for kind in dict.fromkeys(kinds) for step, slip in typical_slips(kind)}
    types = random.Random(f"types {seed}")  # noqa: S311 - data, not secrets
    often = set(types.sample(list(slips), round(slipping_types * len(slips))))
    rates = {words: slip_rates[0 if words in often else 1] for words in slips}
    functions = generate.distinct_functions(
        partial(random_function, random.Random(seed), level=length, kinds=kinds),  # noqa: S311
        count=problems,
        level=length,
        raise_instead="length",
    )
    generator = random.Random(f"responses {seed}")  # noqa: S311
    drawn = []
    for number, (function, cases) in enumerate(functions):
        solution = attrs.evolve(_response(function, generator, slips=slips, rates={}), is_example=False)
        candidates = [
            solution,
            *(_response(function, generator, slips=slips, rates=rates) for _ in range(responses)),
            *(_response(function, generator, slips=slips, rates={}) for _ in range(twins)),
        ]
        problem = generate.as_problem(
            function, f"chain_{number:05d}", cases=cases, solution=solution.response
        )
        drawn.append(
            LabelledProblem(problem=problem, split=generate.split_of(number), candidates=tuple(candidates))
        )
    return drawn


def typical_slips(kind: Kind) -> Iterator[tuple[Step, Step]]:
    """Yield each step that exists with several constants, and its slip: the step with the next constant.

    For example, the slip of "add 3" is "add 4". The slip of the step with the last constant is the step with
    the first constant.
    """
    templates: dict[str, list[Step]] = {}
    for step in STEPS[kind]:
        templates.setdefault(_CONSTANT.sub("#", step.words), []).append(step)
    for steps in templates.values():
        if len(steps) > 1:
            yield from zip(steps, [*steps[1:], steps[0]], strict=True)


def _response(
    function: Function, generator: random.Random, *, slips: Mapping[str, Step], rates: Mapping[str, float]
) -> Candidate:
    """Return a body in a random form, in which each step is a slip with probability `rates[step.words]`.

    A step that is not in `rates` is never a slip.
    """
    steps = tuple(
        slips[step.words] if generator.random() < rates.get(step.words, 0.0) else step
        for step in function.steps
    )
    layout: dict[str, Any] = {
        "forms": tuple(generator.randrange(2) for _ in steps),
        "style": generator.choice(_STYLES),
    }
    text = attrs.evolve(function, steps=steps).body(**layout)
    spans = tuple(slip_spans(function.body(**layout), text))
    return Candidate(response=text, made="mutant" if spans else "solution", spans=spans)


def slip_spans(right: str, written: str) -> Iterator[Span]:
    """Yield a span with weight 0 for each line of `written` that differs from the same line of `right`.

    The span extends from the first to the last character of the line that differs.
    """
    start = 0
    for ours, theirs in zip(right.splitlines(keepends=True), written.splitlines(keepends=True), strict=True):
        if ours != theirs:
            same = _common(ours, theirs)
            same_at_end = _common(ours[same:][::-1], theirs[same:][::-1])
            yield start + same, start + len(theirs) - same_at_end, 0.0
        start += len(theirs)


def _common(one: str, other: str) -> int:
    """Return the length of the common beginning of two texts."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
