"""Components that a recipe names, with their options, and the weightings that other components wrap.

A component whose options hold a `WeightingChoice` wraps another weighting. What it wraps is chosen and
checked with it, so everything that is known of a plan before it is built includes the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
from attrs import define, field, frozen

from weighted_mtp_core.api import BuildContext, Signal, WeightingChoice
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.messages import reason
from weighted_mtp_core.plugins.loading import (
    AnyComponent,
    FoundPlugin,
    Kind,
    LoadedPlugin,
    find,
    load,
    resolve,
)
from weighted_mtp_core.recipe.line_numbers import KeyPath
from weighted_mtp_core.recipe.structure import Fault, plain, structure


@frozen(kw_only=True)
class Part:
    """A weighting that a component's options name.

    Attributes:
        path: Where in the options.
        choice: What stands there.
        chosen: What it comes to.
    """

    path: KeyPath
    choice: WeightingChoice
    chosen: SelectedComponent


@frozen(kw_only=True)
class SelectedComponent:
    """One component of a plan with its options.

    Attributes:
        address: `<plugin>.<component>`.
        plugin: Where it comes from.
        component: Its declaration.
        options: An instance of `component.options`.
        parts: The weightings that its options name.
    """

    address: str
    plugin: FoundPlugin
    component: AnyComponent
    options: Any
    parts: tuple[Part, ...] = ()

    @property
    def needs(self) -> frozenset[Signal]:
        """The signals that must be computed for it and for its parts."""
        return self.component.needs.union(*(part.chosen.needs for part in self.parts))

    def plain_options(self) -> dict[str, Any]:
        """Return the options as TOML would hold them: those of its parts too, with full addresses."""
        table: dict[str, Any] = plain(self.options)
        for part in self.parts:
            place: Any = table
            for key in part.path:
                place = place[key]
            place |= {"use": part.chosen.address, "options": part.chosen.plain_options()}
        return table

    def build(self, context: BuildContext) -> Any:
        """Build the component.

        Raises:
            WmtpError: It cannot be built; names plugin, distribution and version.
        """

        def build_part(choice: WeightingChoice) -> Any:
            chosen = next(part.chosen for part in self.parts if part.choice == choice)
            return chosen.build(context)

        failed = f"{self.plugin} could not build `{self.address}`"
        try:
            return self.component.build(self.options, attrs.evolve(context, weightings=build_part))
        except RunFailedError as error:
            raise RunFailedError(f"{failed}: {error}", hint=error.hint) from error
        except WmtpError as error:
            raise WmtpError(f"{failed}: {error}", hint=error.hint) from error
        except Exception as error:
            raise WmtpError(f"{failed}: {reason(error)}") from error


@define(kw_only=True)
class ComponentSelector:
    """Chooses components by address, loads each plugin once and collects what is wrong with options.

    Attributes:
        place: Makes a context that adds to an error where its key was written.
        loaded: The plugins that were named so far.
        faults: What is wrong with the options so far.
    """

    place: Callable[[KeyPath], AbstractContextManager[None]] = field(default=lambda _: nullcontext())
    loaded: dict[str, LoadedPlugin] = field(factory=dict)
    faults: list[Fault] = field(factory=list)
    _found: Mapping[str, FoundPlugin] = field(factory=find)

    def choose(
        self, kind: Kind, use: str, *, options: Mapping[str, Any], at: KeyPath = ()
    ) -> SelectedComponent:
        """Return the component that `use` names; faults of its options are collected, not raised.

        Args:
            kind: The table that `use` stands in.
            use: `<plugin>.<component>`, or `<plugin>`.
            options: The table beside it.
            at: Where both lie in the recipe.

        Raises:
            WmtpError: There is no such component, or its plugin cannot be used.
        """
        with self.place((*at, "use")):
            name = use.partition(".")[0]
            if name not in self.loaded:
                self.loaded |= load(self._found, [name])
            plugin, component = resolve(self.loaded, kind, use)
        structured, wrong = structure(component.options, options, at=(*at, "options"))
        self.faults += wrong
        return SelectedComponent(
            address=f"{name}.{component.name}",
            plugin=plugin,
            component=component,
            options=structured,
            parts=tuple(
                Part(path=path, choice=choice, chosen=self._part(choice, (*at, "options", *path)))
                for path, choice in weighting_choices(structured)
            ),
        )

    def _part(self, choice: WeightingChoice, at: KeyPath) -> SelectedComponent:
        return self.choose(Kind.WEIGHTING, choice.use, options=choice.options, at=at)


def weighting_choices(value: Any) -> Iterator[tuple[KeyPath, WeightingChoice]]:
    """Find the weightings that structured options name, each with the path to it."""
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
