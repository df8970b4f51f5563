"""Find the statements of a module that a function needs.

A function needs its own definition, the statements before it (except those that do nothing), and those later
statements that these use.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator, Sequence

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_ENDINGS = frozenset({"exit", "_exit", "abort", "main"})
_BUILTINS = frozenset(dir(builtins))


def prune(tree: ast.Module, *, given: int, entry_point: str, keeps_last: bool) -> list[ast.stmt] | None:
    """Return the statements of the code that a function needs; None if no statement defines the function.

    Args:
        tree: The prompt followed by the code.
        given: Number of newlines in the prompt, which is the 0-based number of the first line of the code.
        entry_point: Name of the function.
        keeps_last: Whether the last of several definitions of the function counts, as in Python. If False,
            the first definition counts, because a model that does not stop may write the function again.
    """
    new = [node for node in tree.body if _end(node) > given]
    places = [i for i, node in enumerate(new) if defines(node, entry_point, given=given)]
    if not places:
        return None
    place = places[-1 if keeps_last else 0]
    kept = [*(node for node in new[:place] if not is_idle(node)), new[place]]
    return kept + _used(new[place + 1 :], by=kept, entry_point=entry_point)


def begin(node: ast.stmt) -> int:
    """Return the number of the first line of a statement, including its decorators, counted from 1."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(each.lineno for each in decorators)])


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def defines(node: ast.stmt, name: str, *, given: int = 0) -> bool:
    """Return whether a statement defines, assigns or imports a function or class called `name`.

    A function definition counts only if, after the first `given` lines, which are the prompt, its body has a
    statement that does something and is not itself a definition of `name`. An assignment counts if its value
    is a lambda, a name, an attribute, or a call of another function. A statement such as `if` or `try` counts
    if a statement inside it counts.
    """
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return node.name == name and any(
                _end(each) > given and not is_idle(each) and not _is_function(each, name)
                for each in node.body
            )
        case ast.ClassDef():
            return node.name == name
        case ast.Assign(value=value) | ast.AnnAssign(value=value):
            is_call = isinstance(value, ast.Call) and not _is_name(value.func, name)
            return (is_call or isinstance(value, ast.Lambda | ast.Name | ast.Attribute)) and name in _binds(
                node
            )
        case ast.Import() | ast.ImportFrom():
            return name in _binds(node)
        case ast.If() | ast.For() | ast.While() | ast.With() | ast.Try():
            return any(defines(each, name, given=given) for each in _bodies(node))
    return False


def is_import(nodes: Iterable[ast.stmt], name: str) -> bool:
    """Return whether all statements that define `name` are imports."""
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes if defines(node, name))


def is_idle(node: ast.stmt) -> bool:
    """Return whether a statement does nothing; prose such as `Answer: below` can be such a statement."""
    match node:
        case ast.Expr(value=ast.Call() | ast.Await() | ast.Yield() | ast.YieldFrom()):
            return False
        case ast.Expr() | ast.Pass() | ast.AnnAssign(value=None):
            return True
    return False


def _is_function(node: ast.stmt, name: str) -> bool:
    return isinstance(node, _FUNCTIONS) and node.name == name


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _bodies(node: ast.stmt) -> Iterator[ast.stmt]:
    """Yield the statements inside a compound statement."""
    for key in ("body", "orelse", "finalbody"):
        yield from getattr(node, key, [])
    for handler in getattr(node, "handlers", []):
        yield from handler.body


def _used(later: Iterable[ast.stmt], *, by: Sequence[ast.stmt], entry_point: str) -> list[ast.stmt]:
    """Return, in order, those of the statements `later` that the statements `by` need.

    A statement is needed if it binds or changes a name that `by` and the needed statements found so far read
    but do not set, or that a function among them reads when it is called. Another definition of the function
    `entry_point` is not needed. A statement that uses this function only tries it out, so it is not needed,
    unless it defines another function or class.
    """
    offered = [
        node
        for node in later
        if not defines(node, entry_point)
        and (isinstance(node, (*_FUNCTIONS, ast.ClassDef)) or entry_point not in _needs([node]))
    ]
    kept: list[ast.stmt] = []
    while True:
        needed = _needs([*by, *kept]) | _needs_when_called([*by, *kept])
        more = [node for node in offered if node not in kept and _binds(node) & needed]
        if not more:
            return [node for node in offered if node in kept]
        kept += more


def _needs(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that statements read, but do not assign or take as arguments; scopes are ignored."""
    reads, sets = set(), set()
    for node in (each for statement in nodes for each in ast.walk(statement)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                reads.add(name)
            case ast.Name(id=name) | ast.arg(arg=name):
                sets.add(name)
    return reads - sets


def _needs_when_called(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that the functions in statements read from the module, which may set them before."""
    found = set()
    for function in (each for node in nodes for each in _functions(node)):
        found |= _needs([function])
        for each in ast.walk(function):
            found |= set(each.names) if isinstance(each, ast.Global) else set()
    return found


def _functions(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the functions in a statement, but not those inside another function."""
    if isinstance(node, (*_FUNCTIONS, ast.Lambda)):
        yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from _functions(child)


def _binds(node: ast.AST) -> set[str]:
    """Return the names that a statement of the module binds, and the names of objects that it may change."""
    names = {each.id for each in _stores(node)}
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            names = {name}
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            names = {(alias.asname or alias.name).split(".")[0] for alias in aliases}
        case ast.If() | ast.For() | ast.While() | ast.With() | ast.Try():
            names = names.union(*(_binds(each) for each in _bodies(node)))
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method))):
            names = {name} if method not in _ENDINGS else set()
        case ast.Expr(value=ast.Call(func=ast.Name(id=name), args=arguments)) if name not in _BUILTINS:
            names = {each.id for each in arguments if isinstance(each, ast.Name)}
    return names


def _stores(node: ast.AST) -> Iterator[ast.Name]:
    """Yield the names to which a statement assigns, directly or through an item or attribute."""
    for each in ast.walk(node):
        match each:
            case ast.Name(ctx=ast.Store()):
                yield each
            case ast.Subscript(ctx=ast.Store()) | ast.Attribute(ctx=ast.Store()):
                base: ast.AST = each
                while isinstance(base, ast.Subscript | ast.Attribute):
                    base = base.value
                if isinstance(base, ast.Name):
                    yield base
