"""Import plugins, register them with pluggy and check what they declare.

Core imports only the plugins that it loads by name, so an installed plugin that no recipe names cannot break
a run. If a plugin that a recipe names cannot be loaded, the run stops before it starts. Core does not use
`pluggy.PluginManager.load_setuptools_entrypoints`, which imports every installed plugin and silently drops
one of two plugins with the same name.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint
from typing import Any, Self

import attrs
import pluggy
from attrs import define, field, frozen

from weighted_mtp_core import hookspecs
from weighted_mtp_core.api import Component, Critic, DataSource, Signal, Stateful, Tracker, WeightingStrategy
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import did_you_mean, nearest, quoted, reason, suggest
from weighted_mtp_core.plugins.discovery import GROUP, FoundPlugin, check_metadata, find

AnyComponent = Component[Any, Any]


class Kind(enum.Enum):
    """The kinds of component; the value of each member is the name of the kind's table in a recipe.

    To add a kind, add its class to `weighted_mtp_core.api`, its hook to `weighted_mtp_core.hookspecs` and a
    member to `Kind`. Discovery, loading, addresses, error messages, `plugins show` and `plugins check` then
    work for the new kind without changes. A new kind also needs a table in the recipe's schema, code that
    runs its components, and templates for `plugins new`.

    Attributes:
        label: The name of the kind in messages.
        hook: Name of the hook that declares components of this kind.
        interface: The base class of the objects that `Component.build` returns.
    """

    _value_: str
    label: str
    hook: str
    interface: type[Stateful]

    DATA = "data", "data source", "wmtp_data_sources", DataSource
    CRITIC = "critic", "critic", "wmtp_critics", Critic
    WEIGHTING = "weighting", "weighting", "wmtp_weighting_strategies", WeightingStrategy
    TRACKER = "tracker", "tracker", "wmtp_trackers", Tracker

    def __new__(cls, table: str, label: str, hook: str, interface: type[Stateful]) -> Self:
        """Create a member with the name of the kind's table as its value."""
        kind = object.__new__(cls)
        kind._value_, kind.label, kind.hook, kind.interface = table, label, hook, interface
        return kind


_HOOKS = [kind.hook for kind in Kind]


@frozen(kw_only=True)
class LoadedPlugin:
    """An imported plugin and the components that it declares, keyed by kind and name and sorted by name."""

    found: FoundPlugin
    components: Mapping[Kind, Mapping[str, AnyComponent]] = field(eq=False)

    def addresses(self, kind: Kind) -> list[str]:
        """Return the addresses of the plugin's components of a kind."""
        return [f"{self.found.name}.{name}" for name in self.components[kind]]


@define(kw_only=True)
class PluginRegistry:
    """Loads plugins by name into one `pluggy.PluginManager`; each plugin is loaded at most once.

    A plugin that cannot be loaded is unregistered, so that it does not affect other plugins.

    Attributes:
        found: The installed plugins by name.
        loaded: The plugins that were loaded so far, by name.
    """

    found: Mapping[str, FoundPlugin] = field(factory=find)
    loaded: dict[str, LoadedPlugin] = field(factory=dict, init=False)
    _manager: pluggy.PluginManager = field(init=False)

    @_manager.default
    def _new_manager(self) -> pluggy.PluginManager:
        manager = pluggy.PluginManager(GROUP)
        manager.add_hookspecs(hookspecs)
        return manager

    def load(self, name: str) -> LoadedPlugin:
        """Import a plugin, register its hooks and collect the components that it declares.

        Raises:
            WmtpError: The plugin is not installed, is installed in several versions, shares its name with
                another plugin, has a name that is not valid, requires another version of core, has
                requirements that cannot be parsed, cannot be imported, is the same module as another plugin,
                or has an invalid hook or component.
        """
        if name not in self.loaded:
            if name not in self.found:
                raise not_installed(name, self.found)
            plugin = self.found[name]
            check_metadata(plugin)
            self.loaded[name] = LoadedPlugin(found=plugin, components=self._register(plugin))
        return self.loaded[name]

    def providers(self, signal: Signal) -> list[str]:
        """Return the addresses of all critics, in the plugins loaded so far, that provide a signal."""
        return [
            f"{plugin.found.name}.{name}"
            for plugin in self.loaded.values()
            for name, component in plugin.components[Kind.CRITIC].items()
            if signal in component.provides
        ]

    def _register(self, plugin: FoundPlugin) -> Mapping[Kind, Mapping[str, AnyComponent]]:
        module = _import(plugin)
        _check_functions(plugin, module)
        if registered := self._manager.get_name(module):
            raise WmtpError(f"{plugin} and plugin `{registered}` are the same module: `{plugin.module}`")
        try:
            self._manager.register(module, name=plugin.name)
        except pluggy.PluginValidationError as error:  # registration is atomic: nothing is registered
            raise WmtpError(f"{plugin} declares a hook wrongly: {str(error).splitlines()[-1]}") from error
        try:
            self._check_pending(plugin)
            return {kind: self._declared(plugin, kind) for kind in Kind}
        except BaseException:
            self._manager.unregister(name=plugin.name)
            raise

    def _check_pending(self, plugin: FoundPlugin) -> None:
        """Refuse hooks that core does not have; the error suggests the hook with the nearest name."""
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            callers = self._manager.get_hookcallers(error.plugin) or ()
            unknown = next(caller.name for caller in callers if not caller.has_spec())
            raise WmtpError(
                f"{plugin} declares a hook core does not have: unknown hook `{unknown}`",
                hint=did_you_mean(unknown, _HOOKS) or f"core has {quoted(_HOOKS)}",
            ) from error

    def _declared(self, plugin: FoundPlugin, kind: Kind) -> dict[str, AnyComponent]:
        components: dict[str, AnyComponent] = {}
        for component in self._results(plugin, kind):
            if not isinstance(component, Component):
                got = type(component).__name__
                raise WmtpError(f"{plugin} returns a {got} from `{kind.hook}`; expected a Component")
            address = f"{plugin.name}.{component.name}"
            if component.name in components:
                raise WmtpError(f"{plugin} declares two {kind.label}s named `{address}`")
            _check_options(plugin, address, component.options)
            components[component.name] = component
        return dict(sorted(components.items()))

    def _results(self, plugin: FoundPlugin, kind: Kind) -> list[Any]:
        """Call the plugin's implementations of a kind's hook.

        Implementations are called directly, not through `manager.hook`, which ignores a result of None and
        would therefore hide a forgotten `return`.
        """
        results = []
        for impl in getattr(self._manager.hook, kind.hook).get_hookimpls():
            if impl.plugin_name == plugin.name:
                try:
                    results += list(impl.function())
                except Exception as error:
                    raise WmtpError(f"{plugin} failed in `{kind.hook}`: {reason(error)}") from error
        return results


def not_installed(name: str, found: Iterable[str], *, alternatives: Iterable[str] = ()) -> WmtpError:
    """Return the error for a plugin that is not installed.

    Args:
        name: The name of the plugin that the user gave.
        found: Names of the installed plugins; the hint of the error suggests a similar name, if there is one.
        alternatives: Addresses of components that the hint of the error also suggests.
    """
    near = nearest(name, found)
    others = [address for address in alternatives if address.partition(".")[0] not in near]
    return WmtpError(
        f"no plugin named `{name}` is installed; installed: {quoted(found) or 'none'}",
        hint=suggest(near + others) or "install the package that offers it, then: plugins list",
    )


def _import(plugin: FoundPlugin) -> object:
    try:
        return EntryPoint(plugin.name, plugin.module, GROUP).load()
    except (Exception, SystemExit) as error:
        raise WmtpError(f"{plugin} failed to import `{plugin.module}`: {reason(error)}") from error


def _check_functions(plugin: FoundPlugin, module: object) -> None:
    """Refuse hooks with arguments and hooks without `@hookimpl`; pluggy's `check_pending` detects neither."""
    for name in dir(module):
        function: Callable[..., object] = getattr(module, name)
        if not (name.startswith("wmtp_") and inspect.isroutine(function)):
            continue
        if not hasattr(function, f"{GROUP}_impl"):
            raise WmtpError(
                f"{plugin} defines `{name}` without @hookimpl, so core would never call it",
                hint="from weighted_mtp_core.api import hookimpl",
            )
        parameters = inspect.signature(function).parameters
        if name in _HOOKS and parameters:
            raise WmtpError(f"{plugin} declares arguments of `{name}`: {quoted(parameters)}; hooks have none")


def _check_options(plugin: FoundPlugin, address: str, options: type[Any]) -> None:
    if not attrs.has(options):
        raise WmtpError(f"{plugin} declares options of `{address}` that are not an attrs class: {options!r}")
    try:
        attrs.resolve_types(options)
    except NameError as error:
        raise WmtpError(
            f"{plugin} declares an option of `{address}` with an unknown type: {error}"
        ) from error
