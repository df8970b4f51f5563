"""Mutants: each differs from its program by one change that resembles a human error."""

import ast
import random

import pytest

from weighted_mtp_code_tasks.mutation import mutants

PROGRAM = """\
total = 0
for i in range(10):
    if i > 3 and i % 2 == 0:
        total = total + 1
    total += len(xs[2:])
return max(total, -n)
"""


def body(text):
    return ast.parse("def f(xs, n):\n" + "".join(f"    {line}\n" for line in text.splitlines())).body[0].body


def spelt(statements):
    return ast.unparse(ast.Module(body=statements, type_ignores=[]))


def broken(text, *, count=200, seed=0):
    return {spelt(mutant) for mutant in mutants(body(text), random.Random(seed), count=count)}


def test_mutants_are_programs_that_differ_from_the_original_and_each_other():
    found = [spelt(mutant) for mutant in mutants(body(PROGRAM), random.Random(0), count=20)]

    assert len(set(found)) == len(found) == 20
    assert spelt(body(PROGRAM)) not in found
    for text in found:
        compile("def f(xs, n):\n" + "".join(f"    {line}\n" for line in text.splitlines()), "m", "exec")


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("constant", "return x + 5", {"return x + 4", "return x + 6", "return x + 7"}),
        ("letter", "return s + 'a'", {"return s + 'b'"}),
        ("operator", "return x + y", {"return x - y", "return x * y"}),
        ("negation", "return -x", {"return ~x"}),
        ("condition", "return x < y", {"return x <= y", "return x > y"}),
        ("and, or", "return x and y", {"return x or y"}),
        ("off by one", "for i in range(n):\n    pass", {"for i in range(n + 1):\n    pass"}),
        ("slice", "return x[n:]", {"return x[:n]"}),
        ("call", "return max(x)", {"return min(x)"}),
        ("method", "return s.upper()", {"return s.lower()"}),
        ("dropped statement", "x = y\nreturn x", {"return x"}),
    ],
)
def test_each_kind_of_mistake_is_made(kind, before, after):
    assert after <= broken(before), kind


def test_a_program_with_nothing_to_break_has_no_mutants():
    assert broken("return x") == set()


def test_the_return_is_never_dropped():
    assert all("return" in text for text in broken("x = 1\nreturn x"))


def test_the_same_seed_breaks_the_same_way():
    assert broken(PROGRAM, count=5, seed=3) == broken(PROGRAM, count=5, seed=3)
