"""Make broken variants (mutants) of programs, each by one change that resembles a typical human error.

Some mutants still pass every test. So the data sources run each mutant to decide whether the mutant is wrong.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from functools import partial

_BINARY: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub, ast.Mult),
    ast.Sub: (ast.Add, ast.Mult),
    ast.Mult: (ast.Add, ast.Pow),
    ast.FloorDiv: (ast.Mult, ast.Mod),
    ast.Div: (ast.FloorDiv, ast.Mult),
    ast.Mod: (ast.FloorDiv, ast.Mult),
    ast.Pow: (ast.Mult, ast.Add),
}
_COMPARE: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
_CALLS: dict[str, tuple[str, ...]] = {
    "max": ("min",),
    "min": ("max",),
    "sum": ("len", "max"),
    "len": ("sum",),
    "sorted": ("list",),
    "reversed": ("sorted",),
    "any": ("all",),
    "all": ("any",),
    "abs": ("int",),
    "upper": ("lower",),
    "lower": ("upper",),
    "swapcase": ("upper",),
    "append": ("extend",),
    "startswith": ("endswith",),
    "endswith": ("startswith",),
}
_LETTERS = "abcdeo"

Change = Callable[[random.Random], None]


def mutants(body: list[ast.stmt], generator: random.Random, *, count: int) -> list[list[ast.stmt]]:
    """Return up to `count` different mutants of a function's body or of a program, in random order."""
    original = _spelling(body)
    found: dict[str, list[ast.stmt]] = {}
    for _ in range(6 * count):
        copy = ast.parse(original).body
        module = ast.Module(body=copy, type_ignores=[])
        changes = [change for node in ast.walk(module) for change in _changes(node)]
        if not changes:
            break
        # The kind of change is drawn first, because programs have many constants and few conditions.
        kind = generator.choice(sorted({kind for kind, _ in changes}))
        generator.choice([change for named, change in changes if named == kind])(generator)
        spelling = _spelling(ast.fix_missing_locations(module).body)
        if spelling != original:
            found.setdefault(spelling, module.body)
        if len(found) == count:
            break
    return list(found.values())


def _changes(node: ast.AST) -> Iterator[tuple[str, Change]]:  # noqa: C901 - one case per kind of node
    """Yield each possible change of a node, with its kind; a change is a function that edits the tree."""
    match node:
        case ast.Constant(value=bool()):
            yield "constant", lambda _: setattr(node, "value", not node.value)
        case ast.Constant(value=int()):
            yield "constant", partial(_nudge, node)
        case ast.Constant(value=str(text)) if len(text) == 1:
            yield "constant", partial(_other_letter, node)
        case ast.BinOp(op=op) if type(op) in _BINARY:
            yield "operator", partial(_replace_operator, node)
        case ast.Compare(ops=[op]) if type(op) in _COMPARE:
            yield "condition", partial(_replace_comparison, node)
        case ast.BoolOp(op=op):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield "condition", lambda _: setattr(node, "op", other)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name()):
            yield "operator", lambda _: setattr(node, "op", ast.Invert())
        case ast.Slice(lower=lower, upper=upper) if (lower is None) != (upper is None):
            yield "slice", partial(_swap_bounds, node)
        case ast.Name(id=name) if name in _CALLS:
            yield "call", lambda generator: setattr(node, "id", generator.choice(_CALLS[name]))
        case ast.Attribute(attr=name) if name in _CALLS:
            yield "call", lambda generator: setattr(node, "attr", generator.choice(_CALLS[name]))
        case ast.Call(func=ast.Name(id="range"), args=[*_, last]):
            yield "off by one", partial(_off_by_one, node, last)
        case ast.Module() | ast.For() | ast.While() | ast.If() | ast.FunctionDef() if len(node.body) > 1:
            yield "dropped statement", partial(_drop_statement, node)


def _nudge(node: ast.Constant, generator: random.Random) -> None:
    node.value = int(str(node.value)) + generator.choice((-1, 1, 2))


def _other_letter(node: ast.Constant, generator: random.Random) -> None:
    node.value = generator.choice([letter for letter in _LETTERS if letter != node.value])


def _replace_operator(node: ast.BinOp, generator: random.Random) -> None:
    node.op = generator.choice(_BINARY[type(node.op)])()


def _replace_comparison(node: ast.Compare, generator: random.Random) -> None:
    node.ops = [generator.choice(_COMPARE[type(node.ops[0])])()]


def _swap_bounds(node: ast.Slice, generator: random.Random) -> None:
    del generator
    node.lower, node.upper = node.upper, node.lower


def _off_by_one(node: ast.Call, last: ast.expr, generator: random.Random) -> None:
    step = ast.Constant(value=1)
    op: ast.operator = generator.choice((ast.Add, ast.Sub))()
    node.args[-1] = ast.BinOp(left=last, op=op, right=step)


def _drop_statement(
    node: ast.Module | ast.For | ast.While | ast.If | ast.FunctionDef, generator: random.Random
) -> None:
    droppable = [i for i, statement in enumerate(node.body) if not isinstance(statement, ast.Return)]
    if droppable:
        del node.body[generator.choice(droppable)]


def _spelling(body: list[ast.stmt]) -> str:
    return ast.unparse(ast.Module(body=body, type_ignores=[]))
