"""Find, load and index plugins. `find` imports nothing; `load` imports only what it is told to.

A plugin is a distribution with an entry point in the group `weighted_mtp_core`:

    [project.entry-points.weighted_mtp_core]
    my_plugin = "my_package"

Installed is not active: a plugin that nobody names cannot break anything, and one that a recipe names works
or stops the run. pluggy's own `load_setuptools_entrypoints` would import every installed plugin and keep
one of two plugins of the same name in silence.
"""

from __future__ import annotations

import enum
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any

import attrs
import pluggy
from attrs import field, frozen
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

import weighted_mtp_core
from weighted_mtp_core import hookspecs
from weighted_mtp_core.api import Component, Signal
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import did_you_mean, nearest, quoted, reason

GROUP = "weighted_mtp_core"
CORE_DISTRIBUTION = "weighted-mtp-core"
AnyComponent = Component[Any, Any]


class Kind(enum.Enum):
    """What a component is; the value is its table in a recipe."""

    DATA = "data"
    CRITIC = "critic"
    WEIGHTING = "weighting"
    TRACKER = "tracker"

    @property
    def hook(self) -> str:
        """The hook that declares components of this kind."""
        return _HOOKS[self]

    @property
    def label(self) -> str:
        """The kind in words."""
        return "data source" if self is Kind.DATA else self.value


_HOOKS = {
    Kind.DATA: "wmtp_data_sources",
    Kind.CRITIC: "wmtp_critics",
    Kind.WEIGHTING: "wmtp_weighting_strategies",
    Kind.TRACKER: "wmtp_trackers",
}


@frozen(kw_only=True)
class FoundPlugin:
    """A plugin as its installed metadata describes it; nothing of it is imported.

    Attributes:
        name: The entry point's name, the first half of every address.
        distribution: Canonical name of the distribution, as `pip list` shows it.
        version: The distribution's version.
        module: What the entry point names.
        requires: The distribution's `Requires-Dist` lines.
        rivals: Other distributions that claim the same name.
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
        """The versions of core that it works with, floor first; empty if it names none.

        Raises:
            WmtpError: The metadata cannot be read.
        """
        for line in self.requires:
            try:
                requirement = Requirement(line)
            except InvalidRequirement as error:
                raise WmtpError(f"{self} has metadata that cannot be read: `{line}`") from error
            if canonicalize_name(requirement.name) == CORE_DISTRIBUTION and "extra" not in str(
                requirement.marker
            ):
                # Authors write `>=0.1,<0.2`; packaging and build back ends sort it the other way round.
                floor_first = sorted(
                    requirement.specifier, key=lambda each: (each.operator[0] in "<!", str(each))
                )
                return ",".join(str(each) for each in floor_first)
        return ""


@frozen(kw_only=True)
class LoadedPlugin:
    """An imported plugin and the components it offers, by kind and name."""

    found: FoundPlugin
    components: Mapping[Kind, Mapping[str, AnyComponent]] = field(eq=False)

    def addresses(self, kind: Kind) -> list[str]:
        """Return the addresses of its components of a kind, sorted."""
        return [f"{self.found.name}.{name}" for name in sorted(self.components[kind])]


# --------------------------------------------------------------------------- find


def find(path: Sequence[str] | None = None) -> Mapping[str, FoundPlugin]:
    """Return every installed plugin by name, sorted. Reads metadata only, and nothing found there raises.

    Args:
        path: Folders to look in; `sys.path` unless given.
    """
    claims: dict[str, list[FoundPlugin]] = {}
    seen = set()
    folders = sys.path if path is None else path
    for distribution in distributions(path=list(folders)):
        entries = _entries(distribution.read_text("entry_points.txt") or "")
        if not entries:
            continue
        title, version, requires = _described(distribution)
        canonical = canonicalize_name(title)
        # A virtual environment can list one distribution twice (lib64 links, stale metadata): the first one
        # on the path is the one that would be imported.
        if canonical in seen:
            continue
        seen.add(canonical)
        for name, module in entries.items():
            found = FoundPlugin(
                name=name,
                distribution=canonical,
                version=version,
                module=module,
                requires=requires,
            )
            claims.setdefault(name, []).append(found)
    return {name: _with_rivals(claims[name]) for name in sorted(claims)}


def _described(distribution: Distribution) -> tuple[str, str, tuple[str, ...]]:
    """Return a distribution's name, version and `Requires-Dist` lines, or stand-ins if it has no metadata."""
    try:
        metadata = distribution.metadata
        return metadata["Name"] or "unnamed", metadata["Version"] or "?", tuple(distribution.requires or ())
    # The standard library gives an empty message. Its backport, which answers in its place once anything has
    # imported it (mlflow's packages do), raises.
    except FileNotFoundError:
        return "unnamed", "?", ()


def _entries(text: str) -> dict[str, str]:
    """Read our group of an `entry_points.txt`; lines that make no sense are another tool's concern."""
    entries: dict[str, str] = {}
    group = ""
    for line in text.splitlines():
        if header := re.fullmatch(r"\s*\[(.*)\]\s*", line):
            group = header[1].strip()
        elif group == GROUP and "=" in line and not line.lstrip().startswith("#"):
            name, _, module = line.partition("=")
            entries[name.strip()] = module.strip()
    return entries


def _with_rivals(claims: list[FoundPlugin]) -> FoundPlugin:
    first, *others = sorted(claims, key=lambda each: each.distribution)
    return attrs.evolve(first, conflicts=tuple(others))


# --------------------------------------------------------------------------- load


def load(found: Mapping[str, FoundPlugin], names: Iterable[str]) -> dict[str, LoadedPlugin]:
    """Import the named plugins, register their hooks and collect what they offer.

    Raises:
        WmtpError: A plugin is not installed, claimed twice, made for another core, fails to import, or
            declares something that core would never call.
    """
    return {name: _load_one(found, name) for name in sorted(set(names))}


def _load_one(found: Mapping[str, FoundPlugin], name: str) -> LoadedPlugin:
    if name not in found:
        raise WmtpError(
            f"no plugin named `{name}` is installed; installed: {quoted(found) or 'none'}",
            hint=did_you_mean(name, found) or "install the package that offers it, then: plugins list",
        )
    plugin = found[name]
    _check_name(plugin)
    _check_core_range(plugin)
    manager = _register(plugin, _import(plugin))
    return LoadedPlugin(found=plugin, components={kind: _declared(plugin, manager, kind) for kind in Kind})


def _check_name(plugin: FoundPlugin) -> None:
    if plugin.conflicts:
        claims = [plugin, *plugin.conflicts]
        listed = " and ".join(f"{each.distribution} {each.version}" for each in claims)
        number = "two" if len(claims) == 2 else str(len(claims))
        both = "both" if len(claims) == 2 else "all"
        # core cannot know which of them is wanted, but never advises to remove itself
        spare = next(each.distribution for each in reversed(claims) if each.distribution != CORE_DISTRIBUTION)
        raise WmtpError(
            f"{number} installed packages {both} claim the plugin name `{plugin.name}`: {listed}",
            hint=f"uninstall one, for example: pip uninstall {spare}",
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]*", plugin.name):
        raise WmtpError(f"{plugin} has a name that is no address: expected `[a-z][a-z0-9_]*`")


def _check_core_range(plugin: FoundPlugin) -> None:
    version = weighted_mtp_core.__version__
    core_range = plugin.core_range
    specifier = Requirement(CORE_DISTRIBUTION + core_range).specifier
    if not specifier.contains(version, prereleases=True):
        raise WmtpError(
            f"{plugin} needs {CORE_DISTRIBUTION}{core_range}, but {version} is installed",
            hint=f"install a version of {plugin.distribution} made for {CORE_DISTRIBUTION} {version}",
        )


def _import(plugin: FoundPlugin) -> object:
    entry = EntryPoint(plugin.name, plugin.module, GROUP)
    try:
        return entry.load()
    except (Exception, SystemExit) as error:
        raise WmtpError(f"{plugin} failed to import `{plugin.module}`: {reason(error)}") from error


def _register(plugin: FoundPlugin, module: object) -> pluggy.PluginManager:
    """Register with a manager of its own: one plugin's mistake is never another's."""
    for name in dir(module):
        function = getattr(module, name)
        if name.startswith("wmtp_") and inspect.isroutine(function):
            _check_function(plugin, name, function)
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(module, name=plugin.name)
    except pluggy.PluginValidationError as error:
        raise WmtpError(f"{plugin} declares a hook wrongly: {str(error).splitlines()[-1]}") from error
    # What `check_pending` looks for, with the near miss and without the module's repr.
    for caller in manager.get_hookcallers(module) or []:
        if not caller.has_spec() and not all(impl.optionalhook for impl in caller.get_hookimpls()):
            raise WmtpError(
                f"{plugin} declares a hook core does not have: unknown hook `{caller.name}`",
                hint=did_you_mean(caller.name, _HOOKS.values()) or f"core has {quoted(_HOOKS.values())}",
            )
    return manager


def _check_function(plugin: FoundPlugin, name: str, function: Callable[..., object]) -> None:
    # pluggy ignores an undecorated function, and `check_pending` cannot see it.
    if not hasattr(function, f"{GROUP}_impl"):
        raise WmtpError(
            f"{plugin} defines `{name}` without @hookimpl, so core would never call it",
            hint="from weighted_mtp_core.api import hookimpl",
        )
    parameters = inspect.signature(function).parameters
    if name in _HOOKS.values() and parameters:
        raise WmtpError(f"{plugin} wants arguments in `{name}`: {quoted(parameters)}; a hook gets none")


def _declared(plugin: FoundPlugin, manager: pluggy.PluginManager, kind: Kind) -> dict[str, AnyComponent]:
    components: dict[str, AnyComponent] = {}
    for component in _call(plugin, manager, kind):
        if not isinstance(component, Component):
            got = type(component).__name__
            raise WmtpError(f"{plugin} offers a {got} in `{kind.hook}`; expected a Component")
        address = f"{plugin.name}.{component.name}"
        if component.name in components:
            raise WmtpError(f"{plugin} offers two {kind.label}s named `{address}`")
        if not attrs.has(component.options):
            raise WmtpError(
                f"{plugin} gives `{address}` options that are no attrs class: {component.options!r}"
            )
        try:
            attrs.resolve_types(component.options)
        except NameError as error:
            raise WmtpError(f"{plugin} gives `{address}` an option of an unknown type: {error}") from error
        components[component.name] = component
    return components


def _call(plugin: FoundPlugin, manager: pluggy.PluginManager, kind: Kind) -> list[Any]:
    """Call the plugin's hook. pluggy drops a result of None, which here would hide a forgotten `return`."""
    results = []
    for impl in getattr(manager.hook, kind.hook).get_hookimpls():
        try:
            declared = impl.function()
            results += list(declared)
        except Exception as error:
            raise WmtpError(f"{plugin} failed in `{kind.hook}`: {reason(error)}") from error
    return results


# --------------------------------------------------------------------------- index


def resolve(loaded: Mapping[str, LoadedPlugin], kind: Kind, use: str) -> tuple[FoundPlugin, AnyComponent]:
    """Return the component that `use` names: `<plugin>.<component>`, or `<plugin>` if it offers just one.

    Args:
        loaded: Must hold the plugin that `use` names.
        kind: The table that `use` stands in.
        use: The address.

    Raises:
        WmtpError: The plugin offers no such component, or several and `use` names none of them.
    """
    plugin_name, dot, name = use.partition(".")
    plugin = loaded[plugin_name]
    offered = plugin.components[kind]
    addresses = plugin.addresses(kind)
    if not dot and len(offered) == 1:
        return plugin.found, next(iter(offered.values()))
    if name in offered:
        return plugin.found, offered[name]
    if not offered:
        others = [address for each in Kind for address in plugin.addresses(each)]
        hint = _elsewhere(plugin, name) or (f"it has {quoted(others)}" if others else None)
        raise WmtpError(f"plugin `{plugin_name}` has no {kind.label}", hint=hint)
    if not dot:
        raise WmtpError(
            f"plugin `{plugin_name}` has {len(offered)} {kind.label}s: {quoted(addresses)}",
            hint=f'name one: use = "{addresses[0]}"',
        )
    near = nearest(name, offered)
    raise WmtpError(
        f"plugin `{plugin_name}` has no {kind.label} named `{name}`; it has {quoted(addresses)}",
        hint=f"did you mean `{plugin_name}.{near}`?" if near else _elsewhere(plugin, name),
    )


def _elsewhere(plugin: LoadedPlugin, name: str) -> str | None:
    """Point to the table that the component belongs in, if it is of another kind."""
    for kind in Kind:
        if name in plugin.components[kind]:
            return f"`{plugin.found.name}.{name}` is a {kind.label}: name it in `[{kind.value}]`"
    return None


def providers(loaded: Mapping[str, LoadedPlugin], signal: Signal) -> list[str]:
    """Return the addresses of the loaded critics that provide a signal."""
    return [
        f"{plugin.found.name}.{name}"
        for plugin in loaded.values()
        for name, component in sorted(plugin.components[Kind.CRITIC].items())
        if signal in component.provides
    ]
