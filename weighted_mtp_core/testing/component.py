"""Define the checks that components of every kind must pass."""

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

from weighted_mtp_core.api import BuildContext, Stateful, WmtpError
from weighted_mtp_core.checkpointing.best_model import load_component, save_component
from weighted_mtp_core.plugins.discovery import find
from weighted_mtp_core.plugins.loading import AnyComponent, Kind, PluginRegistry
from weighted_mtp_core.plugins.selection import ComponentSelector, SelectedComponent
from weighted_mtp_core.recipe.structure import plain, structure
from weighted_mtp_core.testing import documents

_HEAVY = ("torch", "transformers", "mlflow", "boto3")
_LOAD = """
import sys
from weighted_mtp_core.plugins.discovery import find
from weighted_mtp_core.plugins.loading import PluginRegistry
PluginRegistry().load(sys.argv[1])
print(*(name for name in sys.argv[2:] if name in sys.modules))
"""


@functools.cache  # a suite has many tests, and reading all metadata is slow
def _registry(path: tuple[str, ...]) -> PluginRegistry:
    return PluginRegistry(found=find(path))


def select(kind: Kind, address: str, options: Mapping[str, Any]) -> SelectedComponent:
    """Return a component of an installed plugin; the test fails if the options are invalid."""
    selector = ComponentSelector(registry=_registry(tuple(sys.path)))
    selected = selector.select(kind, address, options=options)
    assert not selector.faults, [f"{'.'.join(map(str, each.path))}: {each.text}" for each in selector.faults]
    return selected


@functools.cache
def heavy_imports(plugin: str) -> tuple[str, ...]:
    """Return the heavy packages, such as torch, that are imported when a new interpreter loads a plugin."""
    command = [sys.executable, "-c", _LOAD, plugin, *_HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(done.stdout.split())


@contextmanager
def random_numbers_untouched() -> Iterator[None]:
    """Fail the test if code in the `with` block draws numbers from a global random generator or seeds it."""

    def states() -> list[Any]:
        legacy = repr(np.random.get_state(legacy=True))  # noqa: NPY002 - the global state is compared
        return [random.getstate(), legacy, torch.get_rng_state().tolist()]

    # Draw once from each generator; otherwise, a block that sets the same seed as an earlier block would go
    # unnoticed.
    random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002, S311
    before = states()
    yield
    for name, then, now in zip(("random", "numpy.random", "torch"), before, states(), strict=True):
        assert then == now, f"the global generator of `{name}` changed: use one seeded by `context.seed`"


def assert_unchanged(now: Any, before: Any) -> None:
    """Assert that two objects of one attrs class are equal, including their tensors."""
    for each in attrs.fields(type(now)):
        one, other = getattr(now, each.name), getattr(before, each.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, each.name


def copy_state(source: Stateful, target: Stateful, folder: Path) -> None:
    """Copy a component's state to another component through a checkpoint on disk, as a resumed run does."""
    save_component(source, folder)
    load_component(target, folder)


class ComponentSuite:
    """Checks how a component is declared and built, and the class of its options.

    Attributes:
        address: Address of the component, `<plugin>.<component>`; the plugin must be installed.
        kind: The kind of the component, which the suite of each kind sets.
    """

    address: ClassVar[str]
    kind: ClassVar[Kind]

    @pytest.fixture
    def options(self) -> Mapping[str, Any]:
        """The component's table `options` in a recipe; override this fixture to test other options."""
        return {}

    @pytest.fixture
    def context(self, tmp_path: Path) -> BuildContext:
        """The context for `Component.build`; weightings and critics get a stand-in for the policy."""
        has_policy = self.kind in {Kind.WEIGHTING, Kind.CRITIC}
        model = documents.model_context() if has_policy else None
        return BuildContext(seed=7, storage=tmp_path / "storage", model=model)

    @pytest.fixture
    def selected(self, options: Mapping[str, Any]) -> SelectedComponent:
        """The component together with its options, as in the plan of a run."""
        return select(self.kind, self.address, options)

    @pytest.fixture
    def component(self, selected: SelectedComponent) -> AnyComponent:
        """The declaration that the plugin's hook returns."""
        return selected.component

    @pytest.fixture
    def build(self, selected: SelectedComponent, context: BuildContext) -> Callable[[], Any]:
        """A function that builds a new object at each call."""
        return lambda: selected.build(context)

    def test_summary_is_one_line(self, component: AnyComponent) -> None:
        """The summary of a component must be one line, because `plugins show` prints it as one line."""
        assert component.summary.strip()
        assert "\n" not in component.summary

    def test_importing_the_plugin_imports_nothing_heavy(self) -> None:
        """Commands such as `check` must be quick, so importing a plugin must not import torch."""
        assert heavy_imports(self.address.partition(".")[0]) == ()

    def test_options_are_frozen(self, selected: SelectedComponent) -> None:
        """The resolved recipe records the options that a run used, so the options must not change later."""
        fields = attrs.fields(type(selected.options))
        name = fields[0].name if fields else "anything"
        with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
            setattr(selected.options, name, getattr(selected.options, name, None))

    def test_options_are_keyword_only(self, component: AnyComponent) -> None:
        """If options were positional, a new option could safely be added only after all others."""
        assert [each.name for each in attrs.fields(component.options) if each.init and not each.kw_only] == []

    def test_options_are_typed(self, component: AnyComponent) -> None:
        """Every option must have a type, because core checks the values in a recipe against these types."""
        types = typing.get_type_hints(component.options)
        fields = [each.name for each in attrs.fields(component.options)]

        assert [name for name in fields if types.get(name, Any) is Any] == []

    def test_options_survive_a_resolved_recipe(self, selected: SelectedComponent) -> None:
        """The options can be written to the resolved recipe, which is TOML, and read back unchanged."""
        table = tomllib.loads(tomli_w.dumps(plain(selected.options)))
        again, faults = structure(selected.component.options, table)

        assert faults == []
        assert again == selected.options

    def test_builds_its_kind(self, build: Callable[[], Any]) -> None:
        """The built object must be an instance of the base class of its kind, such as `Critic`."""
        assert isinstance(build(), self.kind.interface)

    def test_building_leaves_global_random_numbers_alone(self, build: Callable[[], Any]) -> None:
        """The random numbers of a run must not depend on which other components are built."""
        with random_numbers_untouched():
            build()

    def test_builds_a_new_object_each_time(self, build: Callable[[], Any]) -> None:
        """Each call of `build` must return a new object, so that two runs in one process share no state."""
        assert build() is not build()

    def test_refuses_state_that_it_does_not_keep(self, build: Callable[[], Any]) -> None:
        """Loading the checkpoint of another component must fail."""
        built = build()
        state = {**built.state_dict(), "left_by_something_else": 1}

        with pytest.raises(WmtpError):
            built.load_state_dict(state)
