"""Write a recipe for chosen components; options that are not set become comments.

A line such as `#steps = 300` shows a default. The lines before an option of a component begin with `# ` and
explain the option, with text from the docstring of the class of options. A key of core is explained at the
end of its line, by the comment from `core:defaults.toml`.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import tomli_w

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.plan import Plan, plan_document
from weighted_mtp_core.recipe.document import Document
from weighted_mtp_core.recipe.layers import defaults
from weighted_mtp_core.recipe.line_numbers import find_lines
from weighted_mtp_core.recipe.overrides import parse_overrides
from weighted_mtp_core.recipe.schema import Recipe
from weighted_mtp_core.recipe.structure import default_of, expected, plain

_SHOWN = {"model": ("base", "n_future"), "train": ("steps", "batch_size", "learning_rate")}
_ATTRIBUTE = re.compile(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", re.MULTILINE)
_WIDTH = 100
_HEAD = """\
# A line such as `#steps = 300` shows a default; remove its `#` to change it. All keys of all tables:
#   python -m weighted_mtp_core check {file} --resolved
extends = ["core:defaults.toml"]
"""


def write_recipe(file: Path, settings: Mapping[str, tuple[str, str]], overrides: Sequence[str]) -> None:
    """Write a recipe that `check` accepts.

    Args:
        file: The file to write, which must not exist yet.
        settings: Keys and their values, indexed by the command-line option that set them: for example,
            `data.use` under `--data`.
        overrides: Further settings of the form KEY=VALUE, from `--set`.

    Raises:
        WmtpError: A component does not exist, a required option is missing, the recipe is not valid, or the
            file exists or cannot be written.
    """
    own = [(key.split("."), value, source) for source, (key, value) in settings.items()]
    own += [(keys, value, "--set") for keys, value in parse_overrides(overrides)]
    document, chosen = defaults(name=str(file)), Document(name=str(file))
    for keys, value, source in own:
        document.set(keys, value, source=source)
        chosen.set(keys, value, source=source)
    plan = plan_document(document)
    # the array `tracker` is written whole, because it replaces the array in `core:defaults.toml`
    table = {key: document.table[key] if key == "tracker" else value for key, value in chosen.table.items()}
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write("\n".join([_HEAD.format(file=file), *_lines(table, plan)]))
    except FileExistsError:
        raise WmtpError(f"`{file}` exists", hint="name another file: recipe new FILE ...") from None
    except OSError as error:
        raise WmtpError(f"cannot write `{file}`: {error.strerror}") from error


def _lines(own: Mapping[str, Any], plan: Plan) -> Iterator[str]:
    """Yield the tables of the recipe."""
    components = {"data": plan.data, "critic": plan.critic, "weighting": plan.weighting}
    if "tracker" in own:
        yield f"tracker = {_inline(own['tracker'])}\n"
    for name in (field.name for field in attrs.fields(Recipe) if field.name != "tracker"):
        table = dict(own.get(name, {}))
        options = table.pop("options", {})
        comments = [] if name not in _SHOWN else _default_lines(name, table)
        if not table and not comments:
            continue
        yield f"[{name}]"
        component = components.get(name)
        if component:
            yield f"# {component.component.summary}"
        yield from (f"{key} = {_inline(value)}" for key, value in table.items())
        yield from comments
        if component and attrs.fields(component.component.options):
            yield f"[{name}.options]"
            yield from _option_lines(component.component.options, options)
        yield ""


def _default_lines(name: str, own: Mapping[str, Any]) -> list[str]:
    """Return lines of `core:defaults.toml`, as comments, for keys that the table shows but does not set."""
    (text,) = defaults(name="").texts.values()
    numbers, lines = find_lines(text), text.splitlines()
    return ["#" + lines[numbers[name, key] - 1] for key in _SHOWN[name] if key not in own]


def _option_lines(options: type[Any], own: Mapping[str, Any], *, prefix: str = "") -> Iterator[str]:
    """Yield an explanation and a line for each option; the line is a comment if the option is not set."""
    meanings = _meanings(options)
    if not meanings and not prefix:
        yield from _comment(inspect.cleandoc(options.__doc__ or ""))
    for field in attrs.fields(attrs.resolve_types(options)):
        if not field.init:
            continue
        key, default = str(field.alias), default_of(field)
        if key not in own and attrs.has(type(default)):
            yield from _option_lines(type(default), {}, prefix=f"{prefix}{key}.")
            continue
        kind = expected(field.type) + (", optional" if default is None else "")
        yield from _comment(": ".join(filter(None, [kind, meanings.get(field.name)])))
        if key in own:
            yield f"{prefix}{key} = {_inline(own[key])}"
        else:
            yield f"#{prefix}{key} = {'...' if default is None else _inline(plain(default))}"


def _meanings(options: type[Any]) -> dict[str, str]:
    """Return the text about each option, from the section `Attributes:` in docstrings of option classes."""
    found: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        section = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")[2]
        found |= {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(section)}
    return found


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def _inline(value: Any) -> str:
    """Return a TOML value in one line."""
    if isinstance(value, dict):
        pairs = [tomli_w.dumps({key: 0}).removesuffix("0\n") + _inline(item) for key, item in value.items()]
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")
