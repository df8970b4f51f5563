"""Turn YAML files of the layout before recipes into a recipe: each old key becomes a new one or is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import yaml
from attrs import define, field

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.recipe.old_layout import DroppedError, Old, rule_of


@define(kw_only=True)
class Converted:
    """A recipe made of an old file.

    Attributes:
        table: The recipe.
        moved: Old and new key.
        dropped: Old key and reason.
        description: What the old file said about itself; may be empty.
    """

    table: dict[str, Any] = field(factory=dict)
    moved: list[tuple[str, str]] = field(factory=list)
    dropped: list[tuple[str, str]] = field(factory=list)
    description: str = ""

    def toml(self) -> str:
        """Return the recipe as text."""
        head = f"# {self.description}\n" if self.description else ""
        return head + tomli_w.dumps(self.table)

    def set(self, key: str, value: Any) -> None:
        """Set a dotted key."""
        *path, last = key.split(".")
        table = self.table
        for part in path:
            table = table.setdefault(part, {})
        table[last] = value


def convert(
    old: Old, *, weighting: str, options: Sequence[str], critic: str | None, data: str = "core.jsonl"
) -> Converted:
    """Convert an old file.

    Args:
        old: The file.
        weighting: The weighting's address.
        options: Names of the weighting's options: others are dropped.
        critic: The critic's address, if there is one.
        data: The data source's address; it has the options `train`, `validation` and `test`.
    """
    found = Converted()
    found.set("run.name", "converted")
    found.set("data.use", data)
    if critic is not None:
        found.set("critic.use", critic)
    found.set("weighting.use", weighting)
    for key, value in old.values.items():
        _convert(key, value, old, found, options=options, weighting=weighting)
    _finish(old, found)
    return found


def _convert(
    key: str, value: Any, old: Old, found: Converted, *, options: Sequence[str], weighting: str
) -> None:
    rule = rule_of(key)
    if rule is None:
        found.dropped.append((key, "unknown: nothing here corresponds to it"))
        return
    if key == "experiment.description":
        found.description = " ".join(str(value).split())
    name = rule.new.removeprefix("weighting.options.")
    if not rule.new:
        found.dropped.append((key, rule.note))
    elif name != rule.new and name not in options:
        found.dropped.append((key, f"`{weighting}` has no option `{name}`"))
    elif rule.new.startswith("critic.") and "critic" not in found.table:
        found.dropped.append((key, "there is no critic"))
    else:
        try:
            new = rule.change(value, old)
        except DroppedError as reason:
            found.dropped.append((key, str(reason)))
            return
        if rule.new != "weighting.use":
            found.set(rule.new, new)
        found.moved.append((key, rule.new))


def _finish(old: Old, found: Converted) -> None:
    """Put together what two old keys say, and what a new key needs beside it."""
    clip = found.table.get("weighting", {}).get("options", {})
    if "clip" in clip:
        low, high = old.training("weight_clip_min", 0.1), old.training("weight_clip_max", 3.0)
        clip["clip"] = [float(low), float(high)]
    tracker = found.table.pop("tracker", {"0": {}})
    found.table["tracker"] = [{"use": "core.mlflow", **tracker["0"]}]
    ks = found.table.get("evaluate", {}).get("pass_at_k", [1])
    if max(ks) > 1:
        found.table["evaluate"] |= {"samples": max(ks), "temperature": 0.8}


def read_old(files: Sequence[Path], *, processes: int) -> Old:
    """Read old files; the later ones win, key by key.

    Raises:
        WmtpError: A file is missing or holds no table.
    """
    values: dict[str, Any] = {}
    for file in files:
        try:
            table = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise WmtpError(f"cannot read `{file}`: {' '.join(str(error).split())}") from error
        if not isinstance(table, Mapping):
            raise WmtpError(
                f"`{file}` holds no table", hint="name a YAML file with keys such as `experiment`"
            )
        values |= _flat(table)
    return Old(values=values, processes=processes)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
