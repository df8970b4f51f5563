"""A plugin with components that each violate one rule, and with correct components.

The attribute `caught_by` of a class names the checks that must fail for it; no other check may fail.
`test_suites.py` runs the suites on all classes. Components with names that begin with `Sound` are correct;
each mutant changes one property of a correct component.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from attrs import frozen
from weighted_mtp_core.api import Component, hookimpl

from wmtp_mutants import components, critics, data_sources, trackers, weightings


@frozen(kw_only=True)
class NoOptions:
    """Nothing to choose."""


def component(cls: type[Any], **signals: Any) -> Component[Any, Any]:
    """Declare a class as a component; the class may have `summary`, `options` and `build`."""
    return Component(
        name=name_of(cls),
        summary=getattr(cls, "summary", "One mutant."),
        options=getattr(cls, "options", NoOptions),
        build=getattr(cls, "build", cls),
        **signals,
    )


def name_of(cls: type[Any]) -> str:
    """Return the name in snake case: `sound_file` for the class `SoundFile`."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("_")


def classes(*modules: ModuleType) -> list[type[Any]]:
    """Return every class that these modules define and offer as a component."""
    return [
        each
        for module in modules
        for each in vars(module).values()
        if hasattr(each, "caught_by") and each.__module__ == module.__name__
    ]


@hookimpl
def wmtp_weighting_strategies() -> Any:
    return [
        component(cls, needs=cls.needs, negative_weights=getattr(cls, "negative_weights", False))
        for cls in classes(weightings, components)
    ]


@hookimpl
def wmtp_critics() -> Any:
    return [component(cls, provides=cls.provides) for cls in classes(critics)]


@hookimpl
def wmtp_data_sources() -> Any:
    return [component(cls) for cls in classes(data_sources)]


@hookimpl
def wmtp_trackers() -> Any:
    return [component(cls) for cls in classes(trackers)]


def every_class() -> list[type[Any]]:
    """Return every class of this plugin that is offered as a component."""
    return classes(weightings, components, critics, data_sources, trackers)
