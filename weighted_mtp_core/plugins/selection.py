"""The components that a recipe selects, with their options and with the weightings that they wrap.

A component wraps another weighting if one of its options is a `WeightingChoice`. The wrapped weighting is
selected and checked together with the component, before anything is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import attrs
from attrs import define, field, frozen

from weighted_mtp_core.api import BuildContext, RunFailedError, Signal, WeightingChoice, WmtpError
from weighted_mtp_core.api.components import not_chosen
from weighted_mtp_core.messages import nearest, quoted, reason, suggest
from weighted_mtp_core.plugins.discovery import FoundPlugin
from weighted_mtp_core.plugins.loading import AnyComponent, Kind, LoadedPlugin, PluginRegistry, not_installed
from weighted_mtp_core.recipe.document import Document
from weighted_mtp_core.recipe.line_numbers import KeyPath
from weighted_mtp_core.recipe.structure import Fault, plain, structure


@frozen(kw_only=True)
class SelectedComponent:
    """A component together with its options in a recipe.

    Attributes:
        address: The complete address of the component, `<plugin>.<component>`.
        plugin: The plugin that declares the component.
        component: The declaration of the component.
        options: An instance of `component.options`; None if the options in the recipe have errors.
        wrapped: The weightings that the options select, keyed by the path of the selecting option.
    """

    address: str
    plugin: FoundPlugin
    component: AnyComponent
    options: Any
    wrapped: Mapping[KeyPath, SelectedComponent] = field(factory=dict)

    @property
    def needs(self) -> frozenset[Signal]:
        """The signals that the component and its wrapped weightings need."""
        return self.component.needs.union(*(each.needs for each in self.wrapped.values()))

    @property
    def negative_weights(self) -> bool:
        """Whether the component may return negative weights.

        A component that wraps weightings may return negative weights only if a wrapped weighting may.
        """
        inner = [each.negative_weights for each in self.wrapped.values()]
        return self.component.negative_weights and (any(inner) or not inner)

    @property
    def nested(self) -> Iterator[SelectedComponent]:
        """The component, its wrapped weightings, the weightings that these wrap, and so on."""
        yield self
        for each in self.wrapped.values():
            yield from each.nested

    @property
    def plugins(self) -> Iterator[FoundPlugin]:
        """The plugins of all components in `nested`."""
        return (each.plugin for each in self.nested)

    def plain_options(self) -> dict[str, Any]:
        """Return the options as a TOML table, including the addresses and options of wrapped weightings."""
        options: dict[str, Any] = plain(self.options)
        for path, weighting in self.wrapped.items():
            table: Any = options
            for key in path:
                table = table[key]
            table |= {"use": weighting.address, "options": weighting.plain_options()}
        return options

    def build(self, context: BuildContext) -> Any:
        """Build the component.

        Raises:
            WmtpError: The component cannot be built; the message contains plugin, distribution and version.
        """

        def build_wrapped(choice: WeightingChoice) -> Any:
            for path, own in weighting_choices(self.options):
                if own == choice:
                    return self.wrapped[path].build(context)
            raise not_chosen(choice)

        with _named(f"{self.plugin} could not build `{self.address}`"):
            return self.component.build(self.options, attrs.evolve(context, weightings=build_wrapped))

    def blamed(self, doing: str) -> AbstractContextManager[None]:
        """Return a context manager that adds component, plugin, distribution and version to every error.

        Args:
            doing: What the component does inside the context, for example the name of a method.
        """
        return _named(f"{self.plugin}, `{self.address}`, {doing}")


@contextmanager
def _named(start: str) -> Iterator[None]:
    try:
        yield
    except RunFailedError as error:
        raise RunFailedError(f"{start}: {error}", hint=error.hint) from error
    except WmtpError as error:
        raise WmtpError(f"{start}: {error}", hint=error.hint) from error
    except Exception as error:
        raise WmtpError(f"{start}: {reason(error)}") from error


@define(kw_only=True)
class ComponentSelector:
    """Selects components by address and collects the errors in their options.

    Attributes:
        registry: Loads the plugins that are named in addresses.
        document: The recipe, used to add file and line of a key to an error; None if there is no recipe.
        faults: The errors found so far in the options of all components.
    """

    registry: PluginRegistry = field(factory=PluginRegistry)
    document: Document | None = None
    faults: list[Fault] = field(factory=list)

    def select(
        self, kind: Kind, use: str, *, options: Mapping[str, Any], at: KeyPath = ()
    ) -> SelectedComponent:
        """Return the component that `use` names; errors in its options are added to `faults`, not raised.

        Args:
            kind: Kind of the component.
            use: Address of the component: `<plugin>.<component>`, or `<plugin>` if the plugin has only one
                component of this kind.
            options: The table `options` next to `use` in the recipe.
            at: Path of the recipe's table that contains `use` and `options`.

        Raises:
            WmtpError: `use` does not identify a component, a plugin cannot be loaded, or the same is true of
                a weighting that the options select.
        """
        try:
            plugin, component = resolve(self.registry, kind, use)
        except WmtpError as error:
            if self.document is None:
                raise
            raise WmtpError(f"{error}\n  {self.document.locate((*at, 'use'))}", hint=error.hint) from error
        structured, faults = structure(component.options, options, at=(*at, "options"))
        self.faults += faults
        return SelectedComponent(
            address=f"{plugin.name}.{component.name}",
            plugin=plugin,
            component=component,
            options=structured,
            wrapped={
                path: self.select(
                    Kind.WEIGHTING, choice.use, options=choice.options, at=(*at, "options", *path)
                )
                for path, choice in weighting_choices(structured)
            },
        )


def weighting_choices(value: Any) -> Iterator[tuple[KeyPath, WeightingChoice]]:
    """Yield path and value of each `WeightingChoice` in structured options; mappings are not searched."""
    if isinstance(value, WeightingChoice):
        yield (), value
    elif attrs.has(type(value)):
        for each in attrs.fields(type(value)):
            for path, choice in weighting_choices(getattr(value, each.name)):
                yield (str(each.alias), *path), choice
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            for path, choice in weighting_choices(item):
                yield (i, *path), choice


def resolve(registry: PluginRegistry, kind: Kind, use: str) -> tuple[FoundPlugin, AnyComponent]:
    """Return the component with the address `use`, and its plugin.

    An address is `<plugin>.<component>`, or `<plugin>` if the plugin has only one component of the kind.

    Raises:
        WmtpError: The plugin cannot be loaded, the plugin has no such component, or `use` contains no
            component although the plugin has several components of the kind.
    """
    plugin_name, dot, name = use.partition(".")
    if plugin_name not in registry.found:
        alternatives = same_name(registry, kind, name or plugin_name)
        raise not_installed(plugin_name, registry.found, alternatives=alternatives)
    plugin = registry.load(plugin_name)
    offered = plugin.components[kind]
    if not dot and len(offered) == 1:
        return plugin.found, next(iter(offered.values()))
    if name in offered:
        return plugin.found, offered[name]
    addresses = plugin.addresses(kind)
    if offered and not dot:
        raise WmtpError(
            f"plugin `{plugin_name}` has {len(offered)} {kind.label}s: {quoted(addresses)}",
            hint=f'name one: use = "{addresses[0]}"',
        )
    named = f" named `{name}`; it has {quoted(addresses)}" if offered else ""
    raise WmtpError(
        f"plugin `{plugin_name}` has no {kind.label}{named}", hint=_hint(registry, plugin, kind, name)
    )


def _hint(registry: PluginRegistry, plugin: LoadedPlugin, kind: Kind, name: str) -> str | None:
    """Return a hint for a wrong address, such as a similar address; None if there is nothing to suggest."""
    plugin_name, offered = plugin.found.name, plugin.components[kind]
    near = [f"{plugin_name}.{each}" for each in nearest(name, offered)]
    for other in Kind:
        if not near and name in plugin.components[other]:
            return f"`{plugin_name}.{name}` is a {other.label}: name it in `[{other.value}]`"
    if meant := near + same_name(registry, kind, name):
        return suggest(meant)
    others = [address for other in Kind for address in plugin.addresses(other)]
    return f"it has {quoted(others)}" if others and not offered else None


def same_name(registry: PluginRegistry, kind: Kind, name: str) -> list[str]:
    """Return the addresses of the components with this kind and name in all installed plugins.

    This function loads every installed plugin and skips plugins that fail to load, so use it only for the
    hint of an error.
    """
    addresses = []
    for plugin in registry.found:
        with suppress(WmtpError):
            if name in registry.load(plugin).components[kind]:
                addresses.append(f"{plugin}.{name}")
    return addresses
