"""Find the program in a model's text, which may have code fences, a repeated signature, or prose.

This happens before a text is saved and judged, never during judging: every judge gets the same program.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence

_FENCE = re.compile(r"[ ]{0,3}```")
_BEGINS_CODE = re.compile(r"(?:def|async def|class|import|from|@)\b|@\w")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def cut_completion(text: str, *, prompt: str, entry_point: str) -> str:
    """Return the completion for which `prompt + completion` is the program that was meant.

    Indentation stays as it is. Text and fences around the code are dropped. The function is kept with the
    definitions, imports and assignments that it uses; everything else after it is dropped. A repeated
    signature stays: the later definition replaces the prompt's.

    Args:
        text: The model's text.
        prompt: The beginning of the program; it may end within the function or before it, or be empty.
        entry_point: The name of the function.

    Returns:
        The completion; `text` itself if it does not contain the function.
    """
    lines = _normal(text).split("\n")
    is_whole = parsed(prompt) is not None
    margin = _margin(prompt, entry_point)
    for start in _starts(lines):
        code = "\n".join(lines[start:])
        if start and prompt and not prompt.endswith("\n"):
            code = "\n" + code
        for forms in _forms(code, margin, entry_point=entry_point, is_whole=is_whole):
            cuts = [_longest(form, prompt=prompt, entry_point=entry_point) for form in forms]
            found = [cut for cut in cuts if cut is not None]
            if found:
                return max(found, key=lambda cut: cut.count("\n"))
    return text


def cut_program(text: str) -> str:
    """Return the program in a text: the content of a fence, or the text without the prose around it.

    Returns:
        The program; `text` itself if it contains none.
    """
    lines = _normal(text).split("\n")
    fences = [number for number, line in enumerate(lines) if _FENCE.match(line)]
    after_fence = {number + 1 for number in fences}
    for start in sorted(after_fence | {0}) if fences else range(len(lines)):
        end = next((number for number in fences if number >= start), len(lines))
        for stop in range(end, start, -1):
            code = "\n".join(lines[start:stop])
            tree = parsed(code)
            if tree is None:
                continue
            first = next((node for node in tree.body if not _is_idle(node) or _is_text(node)), None)
            if first is None or all(_is_idle(node) for node in tree.body):
                break  # prose that happens to parse
            return "\n".join(code.split("\n")[_begin(first) - 1 :]).strip("\n") + "\n"
    return text


def _normal(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _starts(lines: Sequence[str]) -> list[int]:
    """Return where code may begin: the first line, a line after a fence, a line like a definition."""
    after_fence = (number + 1 for number, line in enumerate(lines) if _FENCE.match(line))
    definitions = (number for number, line in enumerate(lines) if _BEGINS_CODE.match(line))
    return sorted({0, *after_fence, *definitions})


def _forms(code: str, margin: str, *, entry_point: str, is_whole: bool) -> Iterator[list[str]]:
    """Yield ways to append code to the prompt, the likeliest first; the longest of each list counts.

    Args:
        code: The text after the prompt.
        margin: Indentation of the function's body if the prompt has begun it.
        entry_point: The function.
        is_whole: Whether the prompt alone is a program.
    """
    yield [code]
    stripped = code.lstrip("\n")
    if not margin or not stripped or stripped[0].isspace():
        return
    newline = "\n" * (len(code) > len(stripped))
    if _signature(code, entry_point):
        if not is_whole and _BEGINS_CODE.match(stripped):  # the signature still waits for its body
            yield [f"{newline}{margin}pass\n\n\n{stripped}"]
        return
    # A body without its margin: in the first line only, as after `str.strip`, or in all lines.
    yield [newline + margin + stripped, newline + textwrap.indent(stripped, margin)]


def _margin(prompt: str, entry_point: str) -> str:
    """Return the indentation of the body that the prompt begins; empty if it begins none."""
    begun = _signature(prompt, entry_point)
    if begun is None:
        return ""
    indented = re.search(r"\n([ \t]+)\S", prompt[begun.end() :])
    return indented[1] if indented else "    "


def _signature(code: str, entry_point: str) -> re.Match[str] | None:
    return re.search(rf"^(?:async )?def {re.escape(entry_point)}\b", code, re.MULTILINE)


def _longest(code: str, *, prompt: str, entry_point: str) -> str | None:
    """Drop as many last lines as needed for the code to parse, and return what `_prune` keeps of the rest."""
    lines = code.split("\n")
    for count in range(len(lines), 0, -1):
        kept = "\n".join(lines[:count])
        tree = parsed(prompt + kept)
        if tree is not None:
            return _prune(tree, kept, given=prompt.count("\n"), entry_point=entry_point)
    return None


def _prune(tree: ast.Module, code: str, *, given: int, entry_point: str) -> str | None:
    """Return the lines of the function and of what it uses; None if the code does not define the function.

    Args:
        tree: The prompt and the code.
        code: The code.
        given: Number of newlines in the prompt, which is the 0-based number of the code's first line.
        entry_point: The function.
    """
    new = [node for node in tree.body if _end(node) > given]
    place = next((i for i, node in enumerate(new) if _writes(node, entry_point, given=given)), None)
    if place is None:
        return None
    kept = [*(node for node in new[:place] if not _is_idle(node)), new[place]]
    kept += _used(new[place + 1 :], by=kept, entry_point=entry_point)
    lines = code.split("\n")
    parts = ["\n".join(lines[max(_begin(node) - given - 1, 0) : _end(node) - given]) for node in kept]
    return "\n\n\n".join(parts) + "\n"


def _begin(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(each.lineno for each in decorators)])


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _writes(node: ast.stmt, entry_point: str, *, given: int) -> bool:
    """Return whether a statement is the function with a body that is not only the prompt's."""
    return (
        isinstance(node, _FUNCTIONS)
        and node.name == entry_point
        and any(
            _end(each) > given and not _is_idle(each) and not _is_function(each, entry_point)
            for each in node.body
        )
    )


def _is_function(node: ast.stmt, name: str) -> bool:
    return isinstance(node, _FUNCTIONS) and node.name == name


def _is_idle(node: ast.stmt) -> bool:
    """Return whether a statement does nothing; prose may parse as one (`Solution`, `Answer: below`)."""
    match node:
        case ast.Expr(value=ast.Call() | ast.Await() | ast.Yield() | ast.YieldFrom()):
            return False
        case ast.Expr() | ast.Pass() | ast.AnnAssign(value=None):
            return True
    return False


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _used(later: Iterable[ast.stmt], *, by: Sequence[ast.stmt], entry_point: str) -> list[ast.stmt]:
    """Return the definitions, imports and assignments that the statements `by` need, in order.

    A statement that calls the function itself tries it out and is not needed.
    """
    offered = [
        node
        for node in later
        if not _is_function(node, entry_point)
        and (
            isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom))
            or (isinstance(node, ast.Assign | ast.AnnAssign) and entry_point not in _needs([node]))
        )
    ]
    kept: list[ast.stmt] = []
    while True:
        needed = _needs([*by, *kept])
        more = [node for node in offered if node not in kept and _binds(node) & needed]
        if not more:
            return [node for node in offered if node in kept]
        kept += more


def _needs(nodes: Iterable[ast.stmt]) -> set[str]:
    """Return the names that statements read and do not set, ignoring scopes."""
    reads, sets = set(), set()
    for node in (each for statement in nodes for each in ast.walk(statement)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                reads.add(name)
            case ast.Name(id=name) | ast.arg(arg=name):
                sets.add(name)
    return reads - sets


def _binds(node: ast.stmt) -> set[str]:
    """Return the names that a definition, import or assignment binds in the module."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return {(alias.asname or alias.name).split(".")[0] for alias in names}
    return {
        each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
    }


def parsed(source: str) -> ast.Module | None:
    """Return the tree of a source, without a word about its style; None where Python cannot read it."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
