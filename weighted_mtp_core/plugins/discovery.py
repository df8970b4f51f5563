"""Find installed plugins by reading package metadata; nothing is imported.

A plugin is a distribution with an entry point in the group `weighted_mtp_core`:

    [project.entry-points.weighted_mtp_core]
    my_plugin = "my_package"
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution, distributions

import attrs
from attrs import frozen
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from weighted_mtp_core.errors import WmtpError

GROUP = "weighted_mtp_core"
CORE_DISTRIBUTION = "weighted-mtp-core"


@frozen(kw_only=True)
class FoundPlugin:
    """A plugin as its installed metadata describes it.

    Attributes:
        name: Name of the entry point: the first half of every address.
        distribution: Canonical name of the distribution, as `pip list` shows it.
        version: Version of the distribution.
        module: Module, or `module:object`, that the entry point names.
        requires: The distribution's `Requires-Dist` lines.
        conflicts: Other distributions that claim the same name.
    """

    name: str
    distribution: str
    version: str
    module: str
    requires: tuple[str, ...] = ()
    conflicts: tuple[FoundPlugin, ...] = ()

    def __str__(self) -> str:
        return f"plugin `{self.name}` ({self.distribution} {self.version})"

    @property
    def core_range(self) -> str:
        """The versions of core that it declares, lower bound first; empty if it declares none.

        Raises:
            WmtpError: A `Requires-Dist` line cannot be parsed.
        """
        for line in self.requires:
            try:
                requirement = Requirement(line)
            except InvalidRequirement as error:
                raise WmtpError(f"{self} has metadata that cannot be read: `{line}`") from error
            optional = "extra" in str(requirement.marker)
            if canonicalize_name(requirement.name) == CORE_DISTRIBUTION and not optional:
                # Authors write `>=0.1,<0.2`; packaging and build back ends sort it the other way round.
                floor_first = sorted(requirement.specifier, key=lambda s: (s.operator[0] in "<!", str(s)))
                return ",".join(map(str, floor_first))
        return ""


def find(path: Sequence[str] | None = None) -> Mapping[str, FoundPlugin]:
    """Return every installed plugin by name, sorted. Malformed metadata is skipped, never raised.

    Args:
        path: Folders to search; `sys.path` by default.
    """
    found = sorted(_find_all(path), key=lambda plugin: (plugin.name, plugin.distribution))
    by_name = itertools.groupby(found, key=lambda plugin: plugin.name)
    return {name: attrs.evolve(first, conflicts=tuple(others)) for name, (first, *others) in by_name}


def _find_all(path: Sequence[str] | None) -> Iterator[FoundPlugin]:
    seen = set()
    for distribution in distributions(path=list(sys.path if path is None else path)):
        entries = _entries(distribution.read_text("entry_points.txt") or "")
        if not entries:
            continue
        title, version, requires = _described(distribution)
        canonical = canonicalize_name(title)
        # A virtual environment can list one distribution twice (lib64 links, stale metadata): Python would
        # import the first one on the path.
        if canonical not in seen:
            for name, module in entries.items():
                yield FoundPlugin(
                    name=name, distribution=canonical, version=version, module=module, requires=requires
                )
        seen.add(canonical)


def _entries(text: str) -> dict[str, str]:
    """Read our group of an `entry_points.txt`; malformed lines are left to the tools they are for."""
    entries: dict[str, str] = {}
    group = ""
    for line in text.splitlines():
        if header := re.fullmatch(r"\s*\[(.*)\]\s*", line):
            group = header[1].strip()
        elif group == GROUP and "=" in line and not line.lstrip().startswith("#"):
            name, _, module = line.partition("=")
            entries[name.strip()] = module.strip()
    return entries


def _described(distribution: Distribution) -> tuple[str, str, tuple[str, ...]]:
    """Return a distribution's name, version and `Requires-Dist` lines, or placeholders without metadata."""
    try:
        metadata = distribution.metadata
        return metadata["Name"] or "unnamed", metadata["Version"] or "?", tuple(distribution.requires or ())
    # The standard library returns an empty message. Its backport replaces it once any package has imported
    # it (mlflow's packages do), and raises instead.
    except FileNotFoundError:
        return "unnamed", "?", ()
