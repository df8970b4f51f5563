"""What core promises of every component, whatever its kind."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import attrs
import numpy as np
import pytest
import tomli_w
import torch

from weighted_mtp_core.api import (
    BuildContext,
    Stateful,
    WmtpError,
)
from weighted_mtp_core.checkpointing.best_model import load_component, save_component
from weighted_mtp_core.plugins.loading import AnyComponent, Kind, PluginRegistry
from weighted_mtp_core.plugins.selection import ComponentSelector, SelectedComponent
from weighted_mtp_core.recipe.structure import plain, structure

_HEAVY = ("torch", "transformers", "mlflow", "boto3")
_LOAD = """
import sys
from weighted_mtp_core.plugins.loading import PluginRegistry
PluginRegistry().load(sys.argv[1])
print(*(name for name in sys.argv[2:] if name in sys.modules))
"""


registry = functools.cache(PluginRegistry)  # reading all metadata takes a while, and there are many tests


def choose(kind: Kind, address: str, options: Mapping[str, Any]) -> SelectedComponent:
    """Return a component of an installed plugin; wrong options fail the test."""
    selector = ComponentSelector(registry=registry())
    selected = selector.select(kind, address, options=options)
    assert not selector.faults, [f"{'.'.join(map(str, each.path))}: {each.text}" for each in selector.faults]
    return selected


@functools.cache
def heavy_imports(plugin: str) -> tuple[str, ...]:
    """Return which heavy packages a fresh interpreter has imported after it loaded a plugin."""
    command = [sys.executable, "-c", _LOAD, plugin, *_HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(done.stdout.split())


@contextmanager
def random_numbers_untouched() -> Iterator[None]:
    """Fail if the block draws from or reseeds a generator that other code uses too."""

    def states() -> list[Any]:
        legacy = repr(np.random.get_state(legacy=True))  # noqa: NPY002 - the global state is watched
        return [random.getstate(), legacy, torch.get_rng_state().tolist()]

    # One draw each first: otherwise a block that seeds them as an earlier one did would leave no trace.
    random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002, S311
    before = states()
    yield
    for name, then, now in zip(("random", "numpy.random", "torch"), before, states(), strict=True):
        assert then == now, (
            f"the global generator of `{name}` moved: use one of your own, from `context.seed`"
        )


def carry_over(source: Stateful, target: Stateful, folder: Path) -> None:
    """Bring a component's state to another through a checkpoint on disk, as a resumed run does."""
    save_component(source, folder)
    load_component(target, folder)


class ComponentSuite:
    """Checks of a component's declaration, its options, and how it is built.

    Attributes:
        address: `<plugin>.<component>` of an installed plugin.
        kind: Set by the suite of each kind.
    """

    address: ClassVar[str]
    kind: ClassVar[Kind]

    @pytest.fixture
    def options(self) -> Mapping[str, Any]:
        """The recipe's options table; override it to test other options than the defaults."""
        return {}

    @pytest.fixture
    def context(self, tmp_path: Path) -> BuildContext:
        """What the component is built with."""
        return BuildContext(seed=7, storage=tmp_path / "storage")

    @pytest.fixture
    def component(self, chosen: SelectedComponent) -> AnyComponent:
        """The declaration that the plugin's hook returned."""
        return chosen.component

    @pytest.fixture
    def chosen(self, options: Mapping[str, Any]) -> SelectedComponent:
        """The component with its options, as a plan has it."""
        return choose(self.kind, self.address, options)

    @pytest.fixture
    def structured(self, chosen: SelectedComponent) -> Any:
        """The options as an instance of the component's class."""
        return chosen.options

    @pytest.fixture
    def build(self, chosen: SelectedComponent, context: BuildContext) -> Callable[[], Any]:
        """Build a fresh object, as often as a test likes."""
        return lambda: chosen.build(context)

    def test_summary_is_one_line(self, component: AnyComponent) -> None:
        """`plugins list` shows it in a table."""
        assert component.summary.strip()
        assert "\n" not in component.summary

    def test_importing_the_plugin_imports_nothing_heavy(self) -> None:
        """`plugins list`, `check` and `--help` stay quick: torch is imported by the build function."""
        assert heavy_imports(self.address.partition(".")[0]) == ()

    def test_options_are_frozen(self, structured: Any) -> None:
        """A resolved recipe says what ran; nothing changes it later."""
        fields = attrs.fields(type(structured))
        name = fields[0].name if fields else "anything"
        with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
            setattr(structured, name, getattr(structured, name, None))

    def test_options_are_keyword_only(self, component: AnyComponent) -> None:
        """So that an option may be added anywhere later."""
        assert [each.name for each in attrs.fields(component.options) if each.init and not each.kw_only] == []

    def test_options_are_typed(self, component: AnyComponent) -> None:
        """A recipe is checked against the types."""
        types = typing.get_type_hints(component.options)
        fields = [each.name for each in attrs.fields(component.options)]

        assert [name for name in fields if types.get(name, Any) is Any] == []

    def test_options_survive_a_resolved_recipe(self, component: AnyComponent, structured: Any) -> None:
        """The resolved recipe is TOML, and runs again to the same result."""
        table = tomllib.loads(tomli_w.dumps(plain(structured)))
        again, faults = structure(component.options, table)

        assert faults == []
        assert again == structured

    def test_builds_its_kind(self, build: Callable[[], Any]) -> None:
        """Core calls the methods of the kind's class."""
        assert isinstance(build(), self.kind.interface)

    def test_building_leaves_global_random_numbers_alone(self, build: Callable[[], Any]) -> None:
        """The same recipe and seed give the same numbers, whatever else is built."""
        with random_numbers_untouched():
            build()

    def test_builds_a_new_object_each_time(self, build: Callable[[], Any]) -> None:
        """Two runs in one process share nothing."""
        assert build() is not build()

    def test_refuses_state_that_it_does_not_keep(self, build: Callable[[], Any]) -> None:
        """A checkpoint of something else is a mistake that must not pass for a resume."""
        built = build()
        state = {**built.state_dict(), "left_by_something_else": 1}

        with pytest.raises(WmtpError):
            built.load_state_dict(state)
