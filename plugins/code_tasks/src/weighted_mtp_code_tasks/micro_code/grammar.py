"""A grammar of small Python functions; each is a chain of steps, described in words and written in code.

The docstring of a function describes its steps in order; the body has one line per step and may have a
further line that only returns the result. Held-out functions are chains that the training data do not
contain, so a model cannot solve them by recalling functions of the training data.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from attrs import frozen

Kind = Literal["list", "text", "int"]
_VARIABLE: dict[Kind, str] = {"list": "xs", "text": "s", "int": "n"}
_LETTERS = "abcdeo"


@frozen(kw_only=True)
class Step:
    """A step of a function.

    Attributes:
        words: Description of the step in a docstring.
        forms: Equivalent expressions that apply the step to the variable, written `{v}`; the first expression
            is the reference.
        result: Type of the result.
    """

    words: str
    forms: tuple[str, ...]
    result: Kind


@frozen(kw_only=True)
class Function:
    """A function that applies a chain of steps to one argument, which has the type `kind`."""

    kind: Kind
    steps: tuple[Step, ...]

    @property
    def prompt(self) -> str:
        """The signature and the docstring of the function."""
        words = ", then ".join(step.words for step in self.steps)
        return f'def f({_VARIABLE[self.kind]}):\n    """{words[0].upper()}{words[1:]}."""\n'

    def body(self, forms: tuple[int, ...], *, style: Literal["chain", "final"]) -> str:
        """Return a body of the function, with each step in a chosen form.

        Args:
            forms: For each step, the index of its form, modulo the number of the step's forms.
            style: `chain` assigns the result of every step to the variable and returns the variable; `final`
                returns the expression of the last step.
        """
        variable = _VARIABLE[self.kind]
        expressions = [
            step.forms[form % len(step.forms)].format(v=variable)
            for step, form in zip(self.steps, forms, strict=True)
        ]
        lines = [f"{variable} = {expression}" for expression in expressions]
        if style == "final":
            lines[-1] = f"return {expressions[-1]}"
        else:
            lines.append(f"return {variable}")
        return indented("\n".join(lines))

    def bodies(self, count: int, generator: random.Random) -> list[str]:
        """Return up to `count` different correct bodies, in random order."""
        found: dict[str, None] = {}
        for _ in range(8 * count):
            forms = tuple(generator.randrange(2) for _ in self.steps)
            found[self.body(forms, style=generator.choice(("chain", "final")))] = None
            if len(found) == count:
                break
        return list(found)

    def reference(self) -> Callable[[Any], Any]:
        """Return the function, compiled from the reference forms of its steps."""
        scope: dict[str, Any] = {}
        source = self.prompt + self.body((0,) * len(self.steps), style="final")
        exec(compile(source, "<grammar>", "exec"), scope)  # noqa: S102 - only the grammar's text
        function: Callable[[Any], Any] = scope["f"]
        return function


def indented(code: str) -> str:
    """Return statements as the body of a function, in the layout of `ast.unparse`."""
    body = ast.parse("def f():\n" + "".join(f"    {line}\n" for line in code.splitlines())).body[0]
    return "".join(f"{line}\n" for line in ast.unparse(body).splitlines()[1:])


def _list_steps() -> Iterator[Step]:
    def made(words: str, *forms: str) -> Step:
        return Step(words=words, forms=forms, result="list")

    for k in range(2, 10):
        yield made(f"add {k} to each number", f"[x + {k} for x in {{v}}]", f"[{k} + x for x in {{v}}]")
        yield made(f"multiply each number by {k}", f"[x * {k} for x in {{v}}]", f"[{k} * x for x in {{v}}]")
        yield made(f"subtract {k} from each number", f"[x - {k} for x in {{v}}]")
        yield made(
            f"keep the numbers greater than {k}",
            f"[x for x in {{v}} if x > {k}]",
            f"[x for x in {{v}} if {k} < x]",
        )
        yield made(
            f"keep the numbers less than {k}",
            f"[x for x in {{v}} if x < {k}]",
            f"[x for x in {{v}} if {k} > x]",
        )
        yield made(f"append {k}", f"{{v}} + [{k}]")
        yield made(f"put {k} in front", f"[{k}] + {{v}}")
    for k in range(2, 6):
        yield made(f"keep the multiples of {k}", f"[x for x in {{v}} if x % {k} == 0]")
        yield made(f"drop the multiples of {k}", f"[x for x in {{v}} if x % {k} != 0]")
        yield made(f"keep the first {k} items", f"{{v}}[:{k}]")
        yield made(f"drop the first {k} items", f"{{v}}[{k}:]")
        yield made(f"keep the last {k} items", f"{{v}}[-{k}:]")
        yield made(f"drop the last {k} items", f"{{v}}[:-{k}]")
    yield made("reverse the list", "{v}[::-1]", "list(reversed({v}))")
    yield made("sort the list", "sorted({v})")
    yield made("sort the list from large to small", "sorted({v}, reverse=True)", "sorted({v})[::-1]")
    yield made("square each number", "[x * x for x in {v}]", "[x ** 2 for x in {v}]")
    yield made("negate each number", "[-x for x in {v}]")
    for words, form in (
        ("return the sum", "sum({v})"),
        ("return the largest number or 0", "max({v}, default=0)"),
        ("return the smallest number or 0", "min({v}, default=0)"),
        ("return how many there are", "len({v})"),
    ):
        yield Step(words=words, forms=(form,), result="int")


def _text_steps() -> Iterator[Step]:
    def made(words: str, *forms: str) -> Step:
        return Step(words=words, forms=forms, result="text")

    for letter in _LETTERS:
        yield made(f"append '{letter}'", f"{{v}} + '{letter}'")
        yield made(f"put '{letter}' in front", f"'{letter}' + {{v}}")
        yield made(
            f"remove every '{letter}'",
            f"{{v}}.replace('{letter}', '')",
            f"''.join((c for c in {{v}} if c != '{letter}'))",
        )
        yield Step(words=f"count the letter '{letter}'", forms=(f"{{v}}.count('{letter}')",), result="int")
        for other in _LETTERS:
            if other != letter:
                yield made(f"turn '{letter}' into '{other}'", f"{{v}}.replace('{letter}', '{other}')")
    for k in range(2, 6):
        yield made(f"keep the first {k} letters", f"{{v}}[:{k}]")
        yield made(f"drop the first {k} letters", f"{{v}}[{k}:]")
        yield made(f"keep the last {k} letters", f"{{v}}[-{k}:]")
        yield made(f"drop the last {k} letters", f"{{v}}[:-{k}]")
        yield made(f"repeat the text {k} times", f"{{v}} * {k}", f"{k} * {{v}}")
    yield made("reverse the text", "{v}[::-1]", "''.join(reversed({v}))")
    yield made("make it upper case", "{v}.upper()")
    yield made("swap upper and lower case", "{v}.swapcase()")
    yield Step(words="return the length", forms=("len({v})",), result="int")


def _int_steps() -> Iterator[Step]:
    def made(words: str, *forms: str) -> Step:
        return Step(words=words, forms=forms, result="int")

    for k in range(2, 10):
        yield made(f"add {k}", f"{{v}} + {k}", f"{k} + {{v}}")
        yield made(f"subtract {k}", f"{{v}} - {k}")
        yield made(f"multiply by {k}", f"{{v}} * {k}", f"{k} * {{v}}")
        yield made(f"divide by {k} and round down", f"{{v}} // {k}")
        yield made(f"take the remainder by {k}", f"{{v}} % {k}")
        yield made(f"raise it to at least {k}", f"max({{v}}, {k})", f"max({k}, {{v}})")
        yield made(f"lower it to at most {k}", f"min({{v}}, {k})", f"min({k}, {{v}})")
    yield made("square it", "{v} * {v}", "{v} ** 2")
    yield made("negate it", "-{v}")
    yield made("take the absolute value", "abs({v})")


STEPS: dict[Kind, tuple[Step, ...]] = {
    "list": tuple(_list_steps()),
    "text": tuple(_text_steps()),
    "int": tuple(_int_steps()),
}


def random_function(
    generator: random.Random, *, level: int, kinds: Sequence[Kind] = ("list", "list", "text", "int")
) -> Function:
    """Draw a chain of `level` steps whose argument has one of the types `kinds`.

    By default, the argument is a list for about half of the functions, otherwise a text or a number.
    """
    kind = generator.choice(kinds)
    steps: list[Step] = []
    while len(steps) < level:
        step = generator.choice(STEPS[kind])
        is_last = len(steps) == level - 1
        if step.result == kind or is_last:
            steps.append(step)
    return Function(kind=kind, steps=tuple(steps))


def random_argument(kind: Kind, generator: random.Random) -> Any:
    """Draw an argument: a number from -30 to 59, or a list or text of at most 11 items."""
    if kind == "int":
        return generator.randrange(-30, 60)
    if kind == "text":
        letters = _LETTERS + _LETTERS.upper() + "xyz"
        return "".join(generator.choice(letters) for _ in range(generator.randrange(12)))
    return [generator.randrange(-12, 25) for _ in range(generator.randrange(12))]
