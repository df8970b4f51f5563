"""Find installed plugins by reading package metadata, without importing any plugin.

A plugin is a distribution with an entry point in the group `weighted_mtp_core`:

    [project.entry-points.weighted_mtp_core]
    my_plugin = "my_package"
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os.path
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partialmethod
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

import weighted_mtp_core
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import quoted

GROUP = "weighted_mtp_core"
CORE_DISTRIBUTION = "weighted-mtp-core"


@frozen(kw_only=True)
class FoundPlugin:
    """A plugin as its installed metadata describes it.

    Attributes:
        name: Name of the entry point, which is the first part of the address of each of its components.
        distribution: Canonical name of the distribution: lower case, with `-` between words.
        version: Version of the distribution.
        module: What the entry point refers to: a module, or `module:object`.
        requires: The distribution's `Requires-Dist` lines.
        folders: The plugin's metadata folder, followed by the metadata folders of other versions of its
            distribution in the same parent folder.
        conflicts: Other installed plugins with the same name.
    """

    name: str
    distribution: str
    version: str
    module: str
    requires: tuple[str, ...] = ()
    folders: tuple[str, ...] = attrs.field(default=(), eq=False)
    conflicts: tuple[FoundPlugin, ...] = ()

    def __str__(self) -> str:
        return f"plugin `{self.name}` ({self.distribution} {self.version})"

    @property
    def core_range(self) -> str:
        """The range of core versions that the plugin requires, lower bound first; empty for any version.

        Raises:
            WmtpError: A `Requires-Dist` line cannot be parsed.
        """
        for requirement in self.requirements():
            optional = "extra" in str(requirement.marker)
            if canonicalize_name(requirement.name) == CORE_DISTRIBUTION and not optional:
                # Authors write `>=0.1,<0.2`, but packaging and build back ends reverse the order.
                floor_first = sorted(requirement.specifier, key=lambda s: (s.operator[0] in "<!", str(s)))
                return ",".join(map(str, floor_first))
        return ""

    def requirements(self) -> Sequence[Requirement]:
        """Return the parsed `Requires-Dist` lines.

        Raises:
            WmtpError: A line cannot be parsed.
        """
        found = []
        for line in self.requires:
            try:
                found.append(Requirement(line))
            except InvalidRequirement as error:
                raise WmtpError(f"{self} has metadata that cannot be read: `{line}`") from error
        return found


def find(path: Sequence[str] | None = None) -> Mapping[str, FoundPlugin]:
    """Return every installed plugin, keyed and sorted by name; `metadata_faults` reports damaged metadata.

    Args:
        path: Folders to search; `sys.path` by default.
    """
    installed = _installed(path)
    if any(metadata.undecodable for metadata in installed):
        _replace_undecodable()
    keys = {metadata.key for metadata in installed if metadata.entries}
    used, _ = _used_and_hidden(metadata for metadata in installed if metadata.key in keys)
    plugins = {plugin for metadata in used for plugin in metadata.plugins(used)}
    found = sorted(plugins, key=lambda plugin: (plugin.name, plugin.distribution, plugin.version))
    by_name = itertools.groupby(found, key=lambda plugin: plugin.name)
    return {name: attrs.evolve(first, conflicts=tuple(others)) for name, (first, *others) in by_name}


def metadata_faults(path: Sequence[str] | None = None) -> list[str]:
    """Return a line for each fault of a metadata folder, and for each folder with plugins that is not used.

    A folder is not used if an earlier folder on the path belongs to the same distribution.
    """
    used, hidden = _used_and_hidden(_installed(path))
    faults = [fault for metadata in used for fault in metadata.faults(used)]
    faults += [
        f"`{metadata.folder}` is not used: a folder earlier on the path has `{metadata.key}` too"
        for metadata in hidden
        if metadata.entries
    ]
    return faults


def _installed(path: Sequence[str] | None) -> list[_Metadata]:
    found = (_Metadata(each) for each in distributions(path=list(sys.path if path is None else path)))
    return [each for each in found if not each.stem.startswith("~")]  # pip leaves folders `~...` behind


def _used_and_hidden(installed: Iterable[_Metadata]) -> tuple[list[_Metadata], list[_Metadata]]:
    """Separate the distributions that Python imports from the distributions that Python cannot reach.

    Python imports the first module with a given name on the path, so a distribution hides distributions with
    the same name in later folders. A folder that the path contains twice counts once, because `lib64` in a
    virtual environment can be a link to `lib`.
    """
    real = cache(os.path.realpath)
    first: dict[str, str] = {}
    used: dict[tuple[str, str], _Metadata] = {}
    hidden: list[_Metadata] = []
    for metadata in installed:
        if metadata.entries or metadata.is_described:
            place = real(metadata.folder.parent)
            if first.setdefault(metadata.key, place) == place:
                used.setdefault((place, metadata.folder.name), metadata)
            else:
                hidden.append(metadata)
    return list(used.values()), hidden


@cache
def _replace_undecodable() -> None:
    """Make `importlib.metadata` replace bytes that are not UTF-8 in the metadata of all packages.

    Otherwise torch and mlflow, which read the entry points of all packages, would fail.
    """
    for name in ("importlib.metadata", "importlib_metadata"):
        if importlib.util.find_spec(name):
            finder: Any = importlib.import_module(name).PathDistribution
            finder.read_text = partialmethod(_read_text, finder.read_text)


def _read_text(
    distribution: Distribution, read: Callable[[Distribution, str], str | None], name: str
) -> str | None:
    try:
        return read(distribution, name)
    except UnicodeDecodeError as error:
        return bytes(error.object).decode(errors="replace")


class _Metadata(Distribution):
    """The metadata of one distribution; bytes that are not UTF-8 are replaced.

    Attributes:
        folder: The metadata folder.
        entries: Name and module of each entry point in the group `weighted_mtp_core`.
        undecodable: Names of the metadata files that are not UTF-8, among the files read so far.
    """

    def __init__(self, distribution: Distribution) -> None:
        self._distribution = distribution
        self.undecodable: set[str] = set()
        self.folder = Path(str(getattr(distribution, "_path", distribution.locate_file("unnamed"))))
        self.entries = _entries(self.read_text("entry_points.txt"))

    def read_text(self, filename: str) -> str:
        """Return the contents of a file without a byte order mark; empty if the file does not exist."""
        try:
            text = _read_text(self._distribution, type(self._distribution).read_text, filename) or ""
        except OSError:
            text = ""
        if "\N{REPLACEMENT CHARACTER}" in text:
            self.undecodable.add(filename)
        return text.removeprefix("\ufeff")

    def locate_file(self, path: Any) -> Any:
        """Return the path of a file of the distribution."""
        return self._distribution.locate_file(path)

    @property
    def is_described(self) -> bool:
        """Whether METADATA or PKG-INFO exists; a folder without them is left from a removed package."""
        return (self.folder / "METADATA").is_file() or (self.folder / "PKG-INFO").is_file()

    @property
    def stem(self) -> str:
        """Name and version of the distribution according to the folder's name, without reading a file."""
        return (self.folder.parent if self.folder.name == "EGG-INFO" else self.folder).stem

    @property
    def key(self) -> str:
        """The canonical name of the distribution, taken from the name of the folder."""
        return canonicalize_name(self.stem.partition("-")[0])

    @property
    def title(self) -> tuple[str, str]:
        """Canonical name and version, from METADATA or, if METADATA has none, from the name of the folder."""
        name, _, version = self.stem.partition("-")
        return canonicalize_name(self._field("Name") or name), self._field("Version") or version or "?"

    def _field(self, name: str) -> str:
        return str((self.metadata.get_all(name) or [""])[0])

    def plugins(self, installed: Iterable[_Metadata]) -> Iterator[FoundPlugin]:
        """Yield the plugins of the distribution."""
        others = self._other_versions(installed) if self.entries else []
        for name, module in self.entries:
            distribution, version = self.title
            yield FoundPlugin(
                name=name,
                distribution=distribution,
                version=version,
                module=module,
                requires=tuple(self.requires or ()),
                folders=tuple(map(str, (self.folder, *others))),
            )

    def faults(self, installed: Iterable[_Metadata]) -> Iterator[str]:
        """Yield one line for each fault of the metadata folder."""
        lacking = [name for name in ("Name", "Version") if self.entries and not self._field(name)]
        for name in sorted(self.undecodable):
            yield f"`{self.folder / name}` is not UTF-8"
        if lacking:
            yield f"`{self.folder}` has no {' and no '.join(lacking)} in its METADATA"
        if not self.entries:
            return
        for other in self._other_versions(installed):
            if other > self.folder:
                yield f"`{self.folder}` and `{other.name}` are two versions of one package"

    def _other_versions(self, installed: Iterable[_Metadata]) -> list[Path]:
        same = [each for each in installed if each.key == self.key and each.folder != self.folder]
        return [
            each.folder for each in same if each.title[1] != self.title[1] or each.entries != self.entries
        ]


def _entries(text: str) -> list[tuple[str, str]]:
    """Return (name, module) of each entry point in the group `weighted_mtp_core`; other lines are skipped."""
    entries = []
    group = ""
    for line in text.splitlines():
        line = re.sub(r"(^|\s)[#;].*", "", line).strip()  # noqa: PLW2901 - without its comment
        if header := re.fullmatch(r"\[(.*)\]", line):
            group = header[1].strip()
        elif group == GROUP and "=" in line:
            name, _, module = line.partition("=")
            entries.append((name.strip(), module.strip()))
    return entries


def check_metadata(plugin: FoundPlugin) -> None:
    """Check whether a plugin can be used, according to its metadata.

    Raises:
        WmtpError: Several distributions or versions claim the plugin's name, the name is not valid in an
            address, the plugin requires another version of core, or its requirements cannot be parsed.
    """
    _check_name(plugin)
    _check_core_range(plugin)


def _check_name(plugin: FoundPlugin) -> None:
    if len(plugin.folders) > 1:
        raise WmtpError(
            f"{plugin} has metadata of several versions: {quoted(plugin.folders)}",
            hint=f"delete the folders of versions that are not in use, or reinstall {plugin.distribution}",
        )
    if plugin.conflicts:
        claims = [plugin, *plugin.conflicts]
        listed = " and ".join(f"{each.distribution} {each.version}" for each in claims)
        number, both = ("two", "both") if len(claims) == 2 else (str(len(claims)), "all")
        # Core cannot know which plugin the user wants, but it never suggests uninstalling core.
        spare = next(each.distribution for each in reversed(claims) if each.distribution != CORE_DISTRIBUTION)
        raise WmtpError(
            f"{number} installed packages {both} claim the plugin name `{plugin.name}`: {listed}",
            hint=f"uninstall one, for example: pip uninstall {spare}",
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]*", plugin.name):
        raise WmtpError(f"{plugin} has a name that is not valid in an address: expected `[a-z][a-z0-9_]*`")


def _check_core_range(plugin: FoundPlugin) -> None:
    version = weighted_mtp_core.__version__
    core_range = plugin.core_range
    if not Requirement(CORE_DISTRIBUTION + core_range).specifier.contains(version, prereleases=True):
        raise WmtpError(
            f"{plugin} needs {CORE_DISTRIBUTION}{core_range}, but {version} is installed",
            hint=f"install a version of {plugin.distribution} made for {CORE_DISTRIBUTION} {version}",
        )
