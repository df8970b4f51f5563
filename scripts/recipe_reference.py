"""Write the tables of docs/recipes.md from the classes that define a recipe.

    python scripts/recipe_reference.py

Keys, types, defaults and ranges come from the classes, in the order of their fields. The meanings of keys are
written by hand in the file and are kept. A key without a meaning is an error. Rows of removed keys are
deleted.
"""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
from weighted_mtp_core.recipe import schema, train_table
from weighted_mtp_core.recipe.structure import default_of, expected, plain

FILE = Path(__file__).parents[1] / "docs" / "recipes.md"
TABLES: dict[str, type] = {
    "[run]": schema.RunTable,
    "[model]": schema.ModelTable,
    "[model.heads]": schema.HeadsTable,
    "[model.adapters]": schema.AdaptersTable,
    "[model.micro]": schema.MicroTable,
    "[data]": schema.DataTable,
    "[critic]": schema.CriticTable,
    "[critic.pairs]": schema.PairsTable,
    "[weighting]": schema.Selection,
    "[loss]": schema.LossTable,
    "[train]": train_table.PolicyTrainTable,
    "[train.optimiser]": train_table.OptimiserTable,
    "[checkpoint]": schema.CheckpointTable,
    "[evaluate]": schema.EvaluateTable,
    "[[tracker]]": schema.TrackerTable,
}
HEAD = ("| key | type | default | range | meaning |", "|---|---|---|---|---|")


def kind(field: attrs.Attribute[Any]) -> str:
    """Return the type of a field, in the form that the documentation shows."""
    if typing.get_origin(field.type) is typing.Literal:
        return ", ".join(f'`"{choice}"`' for choice in typing.get_args(field.type))
    return expected(field.type)


def default(field: attrs.Attribute[Any]) -> str:
    """Return the default of a field in TOML; a dash if there is none, and no text if it is a table."""
    value = default_of(field)
    if value is attrs.NOTHING or value is None:
        return "-"
    if attrs.has(type(value)):
        return ""
    written = plain(value)
    if isinstance(written, bool):
        return f"`{str(written).lower()}`"
    return f'`"{written}"`' if isinstance(written, str) else f"`{written}`"


def bounds(validator: Any) -> Iterator[str]:
    """Yield the bounds that the validators of a field check."""
    for each in getattr(validator, "_validators", ()):
        yield from bounds(each)
    if hasattr(validator, "validator"):  # the validator of a key that may be missing
        yield from bounds(validator.validator)
    if hasattr(validator, "compare_op"):
        yield f"{validator.compare_op} {validator.bound}"


def generated(text: str) -> str:
    """Return the text of the file with its tables rewritten.

    Raises:
        SystemExit: A table or the meaning of a key is missing in the file.
    """
    for title, table in TABLES.items():
        before, found, after = text.partition(f"### `{title}`\n")
        if not found:
            sys.exit(f"error: {FILE.name} has no section `{title}`")
        section, end, rest = after.partition("\n### ")
        first = section.index("| key |")
        length = len(re.match(r"(\|.*\n?)*", section[first:])[0])  # type: ignore[index]
        lines = section[first : first + length].splitlines()[2:]
        cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
        meaning = {row[0].strip("`"): row[-1] for row in cells if row[-1]}
        written = [*HEAD]
        for field in attrs.fields(attrs.resolve_types(table)):
            if field.alias not in meaning:
                sys.exit(
                    f"error: {FILE.name} does not say what `{field.alias}` of `{title}` means: add a row"
                )
            limits = ", ".join(f"`{bound}`" for bound in bounds(field.validator))
            cell = (f"`{field.alias}`", kind(field), default(field), limits, meaning[field.alias])
            written.append("| " + " | ".join(cell) + " |")
        tail = section[first + length :]
        text = before + found + section[:first] + "\n".join(written) + "\n" + tail + end + rest
    return text


if __name__ == "__main__":
    FILE.write_text(generated(FILE.read_text(encoding="utf-8")), encoding="utf-8")
