"""Find the program in a model's text, which may contain code fences, a repeated signature, or prose.

The program is cut out before a text is saved and judged, never during judging, so that every judge gets the
same program.

Text inside `<think>` or `<thinking>` is ignored. `cut_program` returns a whole program. `cut_completion`
returns the code of the function that the tests call. If the text begins with the body of the prompt's
function, this body is the answer. Otherwise, the answer is the last code that defines the function: if
possible in a closed fence, otherwise in an open fence, otherwise outside fences. Code that only imports the
function is the answer only if no code defines the function, because examples of use also import it.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence

from attrs import frozen

from weighted_mtp_code_tasks.definitions import begin, is_idle, is_import, prune

_FENCE = re.compile(r"([ ]{0,3})(?:```|~~~)[ ]*([^\s`]*)")
_BEGINS_CODE = re.compile(r"(?:def|async def|class|import|from|@)\b|@\w")
_THOUGHT = re.compile(r"^[ \t]*<(think(?:ing)?)>.*?(?:</\1>|\Z)", re.DOTALL | re.MULTILINE)
_END_OF_THOUGHT = re.compile(r"\A.*(?<![\"'`])</think(?:ing)?>(?![\"'`])", re.DOTALL)
_CONTROL_TOKEN = re.compile(r"(?:<\|\w+\|>|</?s>|<(?:eos|bos|pad|end_of_turn)>).*", re.DOTALL)


def cut_completion(text: str, *, prompt: str, entry_point: str) -> str:
    """Return the part of a model's text that must follow the prompt to give the intended program.

    Text and fences around the code are dropped. The completion contains the function, the statements before
    the function (except those that do nothing), and the later statements that these use. If the model
    repeats the signature, the signature is kept, because a later definition of a function replaces an earlier
    definition.

    Args:
        text: The model's text.
        prompt: The beginning of the program. It may be empty, or end before the function or inside it.
        entry_point: Name of the function, which the code may define, assign or import.

    Returns:
        The completion; `text` itself if it contains no valid code that defines the function.
    """
    lines = _lines(text)
    margin = _margin(prompt, entry_point)
    found = list(_blocks(lines, _Prompt(prompt, margin, entry_point, parsed(prompt) is not None)))
    if found and found[0].continues:
        return found[0].code
    found = [each for each in found if not each.imports] or found
    closed = [each for each in found if each.fence == "closed"]
    fenced = [each for each in found if each.fence]
    return next((group[-1].code for group in (closed, fenced, found) if group), text)


def cut_program(text: str) -> str:
    """Return the program in a text: the last fenced block of Python, otherwise the code before any fence.

    A block in a closed fence is preferred to a block in an open fence.

    Returns:
        The program; `text` itself if it contains no program.
    """
    lines = _lines(text)
    opened = _opened(lines)
    for only_closed in (True, False):
        for start, (indent, end) in reversed(opened.items()):
            if end is not None or not only_closed:
                block = [line.removeprefix(indent) for line in lines[start:end]]
                if program := _first_program(block, starts=(0,)):
                    return program
    first_fence = next((number for number, line in enumerate(lines) if _FENCE.match(line)), len(lines))
    return _first_program(lines[:first_fence], starts=range(first_fence)) or text


def _first_program(lines: Sequence[str], *, starts: Sequence[int]) -> str | None:
    for start in starts:
        for stop in range(len(lines), start, -1):
            code, tree = _parsed_lines(lines[start:stop], "")
            if isinstance(tree, int):
                continue
            first = next((node for node in tree.body if not is_idle(node) or _is_text(node)), None)
            if first is None or all(is_idle(node) for node in tree.body):
                break  # prose that is valid Python by chance
            return "\n".join(code.split("\n")[begin(first) - 1 :]).strip("\n") + "\n"
    return None


@frozen
class _Prompt:
    """A prompt, with properties that decide how it can be completed.

    Attributes:
        text: The text of the prompt.
        margin: Indentation of the function's body; by default four spaces. Empty if the prompt does not
            contain the signature of the function.
        entry_point: Name of the function.
        is_whole: Whether the prompt is valid Python without a completion.
    """

    text: str
    margin: str
    entry_point: str
    is_whole: bool


@frozen(kw_only=True)
class _Block:
    """Code that defines the function.

    Attributes:
        code: The code, as a completion of the prompt.
        continues: Whether the text begins with this code, and the code is the body of the function that the
            prompt begins.
        imports: Whether the code only imports the function.
        fence: `closed` or `open` if the code is in a fence, otherwise empty.
    """

    code: str
    continues: bool
    imports: bool
    fence: str


def _lines(text: str) -> list[str]:
    """Return the lines of a text, except what is inside `<think>` or `<thinking>`.

    Everything before the last closing tag is also left out, because the opening tag may be in the prompt.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _THOUGHT.sub("", text)
    return _END_OF_THOUGHT.sub("", text).split("\n")


def _opened(lines: Sequence[str]) -> dict[int, tuple[str, int | None]]:
    """Return the fenced blocks: a dict from their first line to their indentation and their closing line.

    Lines are numbers, counted from 0; the closing line is None if the fence is open.
    """
    found: dict[int, tuple[str, int | None]] = {}
    start = None
    for number, line in enumerate(lines):
        if (fence := _FENCE.match(line)) is None:
            continue
        if start is not None:
            found[start] = found[start][0], number
        if start is None or fence[2]:
            start = number + 1
            found[start] = fence[1], None
        else:
            start = None
    return found


def _blocks(lines: Sequence[str], prompt: _Prompt) -> Iterator[_Block]:
    """Yield the blocks of code that define the function, in order of the text; blocks do not overlap."""
    opened = _opened(lines)
    after_fence = {number + 1 for number, line in enumerate(lines) if _FENCE.match(line)}
    assigned = re.compile(rf"{re.escape(prompt.entry_point)}\s*[:=]")
    definitions = {
        number for number, line in enumerate(lines) if _BEGINS_CODE.match(line) or assigned.match(line)
    }
    bodies = {0} | after_fence
    done = 0
    for start in sorted(bodies | definitions):
        if start < done:
            continue
        indent, _ = opened.get(start, ("", None))
        code = "\n".join(line.removeprefix(indent) for line in lines[start:])
        may_continue = prompt.margin and start in bodies
        if not may_continue and prompt.entry_point not in code:
            continue
        if start and prompt.text and not prompt.text.endswith("\n"):
            code = "\n" + code
        fence = _fence_at(start, opened)
        for forms in _forms(code, prompt):
            cuts = [_longest(form, prompt, keeps_last=bool(fence)) for form in forms]
            found = [cut for cut in cuts if cut is not None]
            if not found:
                continue
            cut, nodes, dropped = max(found, key=lambda each: each[0].count("\n"))
            yield _Block(
                code=cut,
                continues=start == 0 and bool(prompt.margin) and not _signature(cut, prompt.entry_point),
                imports=is_import(nodes, prompt.entry_point),
                fence=fence,
            )
            done = len(lines) - dropped
            break


def _fence_at(line: int, opened: dict[int, tuple[str, int | None]]) -> str:
    for start, (_, end) in opened.items():
        if start <= line and (end is None or line < end):
            return "open" if end is None else "closed"
    return ""


def _forms(code: str, prompt: _Prompt) -> Iterator[list[str]]:
    """Yield lists of texts to append to the prompt, the most likely list first.

    The caller chooses the first list in which any text defines the function. From this list, the caller
    chooses the text whose completion has the most lines.
    """
    yield [code]
    margin = prompt.margin
    stripped = code.lstrip("\n")
    if not margin or not stripped or stripped[0].isspace():
        return
    newline = "\n" * (len(code) > len(stripped))
    if _signature(code, prompt.entry_point):
        if not prompt.is_whole and _BEGINS_CODE.match(stripped):  # the prompt's signature has no body yet
            yield [f"{newline}{margin}pass\n\n\n{stripped}"]
        return
    # The indentation of the body is missing in its first line only, as after `str.strip`, or in all lines.
    yield [newline + margin + stripped, newline + textwrap.indent(stripped, margin)]


def _margin(prompt: str, entry_point: str) -> str:
    """Return the indentation of the function's body; empty if the prompt does not contain its signature."""
    begun = _signature(prompt, entry_point)
    if begun is None:
        return ""
    indented = re.search(r"\n([ \t]+)\S", prompt[begun.end() :])
    return indented[1] if indented else "    "


def _signature(code: str, entry_point: str) -> re.Match[str] | None:
    return re.search(rf"^(?:async )?def {re.escape(entry_point)}\b", code, re.MULTILINE)


def _longest(code: str, prompt: _Prompt, *, keeps_last: bool) -> tuple[str, list[ast.stmt], int] | None:
    """Drop lines from the end until the code is valid Python; keep the statements that the function needs.

    Returns:
        The completion, its statements, and the number of dropped lines; None if the code does not define the
        function, or never becomes valid Python.
    """
    lines = code.split("\n")
    given = prompt.text.count("\n")
    count = len(lines)
    while count > 0:
        kept, tree = _parsed_lines(lines[:count], prompt.text)
        if isinstance(tree, int):  # all code that contains the line with the error has the error
            count = min(count - 1, max(tree - given, 1))
            continue
        nodes = prune(tree, given=given, entry_point=prompt.entry_point, keeps_last=keeps_last)
        if nodes is None:
            return None
        own = kept.split("\n")
        parts = ["\n".join(own[max(begin(n) - given - 1, 0) : (n.end_lineno or 0) - given]) for n in nodes]
        return "\n\n\n".join(parts) + "\n", nodes, len(lines) - count
    return None


def _parsed_lines(lines: Sequence[str], before: str) -> tuple[str, ast.Module | int]:
    """Parse lines after the text `before`; return their code, and the tree or the line of a syntax error.

    The line is `sys.maxsize` if it is unknown. If the lines are not valid Python, and the last line contains
    a control token such as `<|im_end|>`, this line is cut off before the token, because a model may write
    the token as text.
    """
    code = "\n".join(lines)
    tree = _tree_or_line(before + code)
    if isinstance(tree, int) and lines and (token := _CONTROL_TOKEN.search(lines[-1])):
        code = "\n".join([*lines[:-1], lines[-1][: token.start()].rstrip()])
        return code, _tree_or_line(before + code)
    return code, tree


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def parsed(source: str) -> ast.Module | None:
    """Return the syntax tree of a source, without syntax warnings; None if Python cannot parse the source."""
    tree = _tree_or_line(source)
    return None if isinstance(tree, int) else tree


def _tree_or_line(source: str) -> ast.Module | int:
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(source)
    except SyntaxError as error:
        return error.lineno or sys.maxsize
    except (ValueError, RecursionError, MemoryError):
        return sys.maxsize
