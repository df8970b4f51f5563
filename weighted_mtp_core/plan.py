"""Turn a recipe into a plan: every component chosen and checked, nothing built. Imports no torch.

What can be known to be wrong is an error here, in half a second, before a model is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import attrs
from attrs import frozen

from weighted_mtp_core.api import SAME_RESULT, Signal
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.identifiers import check_path, flat, tag_pairs
from weighted_mtp_core.plugins.loading import Kind, PluginRegistry
from weighted_mtp_core.plugins.selection import ComponentSelector, SelectedComponent
from weighted_mtp_core.recipe.document import Document
from weighted_mtp_core.recipe.layers import read_document
from weighted_mtp_core.recipe.line_numbers import KeyPath
from weighted_mtp_core.recipe.load import recipe_to_toml, structure_recipe
from weighted_mtp_core.recipe.schema import Recipe, Selection
from weighted_mtp_core.recipe.structure import Fault, plain

DEFAULT_EXPERIMENT_PREFIX = "weighted_mtp"
CRITIC_SIGNALS = (Signal.VALUE, Signal.REFERENCE_LOSS)
"""Signals that only a critic can fill; the core computes the others itself."""

_PLUGIN_TAG = "wmtp.plugin."
ADDRESS_TAGS = ("weighting", "critic", "data")
SelectionT = TypeVar("SelectionT", bound=Selection)


@frozen(kw_only=True)
class Plan:
    """A recipe of which everything has been checked that can be without building anything.

    Attributes:
        recipe: The resolved recipe: full addresses, every option filled in.
        experiment: `run.experiment`, or `<experiment_prefix>/<weighting plugin>`.
        tags: What every tracker tags the run with.
        params: The resolved recipe as dotted keys.
        recipe_toml: The resolved recipe as text; it runs again to the same result.
        recipe_sha256: Of that text.
        files: Every file that the recipe was read from, lowest layer first.
        same_result: Dotted keys of the options that do not change the result (`api.SAME_RESULT`), sorted.
    """

    recipe: Recipe
    weighting: SelectedComponent
    critic: SelectedComponent | None
    data: SelectedComponent
    trackers: tuple[SelectedComponent, ...]
    experiment: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    recipe_toml: str
    recipe_sha256: str
    files: tuple[str, ...] = ()
    same_result: tuple[str, ...] = ()

    @property
    def runs_folder(self) -> Path:
        """Where the plan's runs lie, those of all experiments."""
        table = self.recipe.run
        return Path(table.output_dir) if table.output_dir else Path(table.storage) / "runs"

    @property
    def identity(self) -> dict[str, dict[str, str]]:
        """What makes a run the same run: the resolved recipe and the plugins' versions."""
        plugins = {
            key.removeprefix(_PLUGIN_TAG): value
            for key, value in self.tags.items()
            if key.startswith(_PLUGIN_TAG)
        }
        return {"params": dict(self.params), "plugins": plugins}


def make_plan(
    path: Path, *, preset: str | None = None, overrides: Sequence[str] = (), run_name: str | None = None
) -> Plan:
    """Read a recipe, load the plugins it names and check that all of it fits together.

    Raises:
        WmtpError: Lists every fault of the recipe and of the components' options at once; or says which
            plugin cannot be used, or which signal no critic provides.
    """
    document = read_document(path, preset=preset, overrides=overrides, run_name=run_name)
    recipe, faults = structure_recipe(document)
    picks = _picks(document.table)
    if recipe is None:
        with suppress(WmtpError):  # a plugin's own error can wait until the recipe is one
            faults += _Choice.make(document, picks).faults
        raise document.error(faults)
    choice = _Choice.make(document, picks)
    faults = choice.faults + _cross_faults(recipe)
    if faults:
        raise document.error(faults)
    plan = _plan(recipe, choice, document)
    _match_signals(plan, choice.registry)
    return plan


# --------------------------------------------------------------------------- choosing components


@frozen
class _Pick:
    """A table of the recipe that names a component."""

    kind: Kind
    at: KeyPath
    use: str
    options: Mapping[str, Any]


def _picks(table: Mapping[str, Any]) -> list[_Pick]:
    """Collect every well-formed selection, also from a recipe that is wrong elsewhere."""
    places: list[tuple[Kind, KeyPath, Any]] = [
        (kind, (kind.value,), table.get(kind.value)) for kind in Kind if kind is not Kind.TRACKER
    ]
    trackers = table.get("tracker")
    if isinstance(trackers, list):
        places += [(Kind.TRACKER, ("tracker", i), each) for i, each in enumerate(trackers)]
    return [
        _Pick(kind, at, selection["use"], selection.get("options", {}))
        for kind, at, selection in places
        if isinstance(selection, dict)
        and isinstance(selection.get("use"), str)
        and isinstance(selection.get("options", {}), dict)
    ]


@frozen
class _Choice:
    """The components that a recipe names, and what is wrong with their options."""

    registry: PluginRegistry
    chosen: Mapping[KeyPath, SelectedComponent]
    faults: list[Fault]

    @classmethod
    def make(cls, document: Document, picks: Sequence[_Pick]) -> _Choice:
        selector = ComponentSelector(locate=lambda path: _naming_place(document, path))
        chosen = {
            pick.at: selector.select(pick.kind, pick.use, options=pick.options, at=pick.at) for pick in picks
        }
        return cls(selector.registry, chosen, selector.faults)


@contextmanager
def _naming_place(document: Document, path: KeyPath) -> Iterator[None]:
    """Add a line with the recipe's file, line and key to an error about a component."""
    try:
        yield
    except WmtpError as error:
        raise WmtpError(f"{error}\n  {document.locate(path)}", hint=error.hint) from error


def _match_signals(plan: Plan, registry: PluginRegistry) -> None:
    needed = [signal for signal in CRITIC_SIGNALS if signal in plan.weighting.needs]
    provided = plan.critic.component.provides if plan.critic else frozenset()
    for signal in needed:
        if signal in provided:
            continue
        lacking = f"critic `{plan.critic.address}` does not provide" if plan.critic else "no critic provides"
        able = registry.providers(signal)
        use = able[0] if able else "<plugin>.<critic>"
        raise WmtpError(
            f"weighting `{plan.weighting.address}` needs the signal `{signal.value}`, which {lacking}",
            hint=f'in table `[critic]`: use = "{use}"',
        )


# --------------------------------------------------------------------------- resolving


def _cross_faults(recipe: Recipe) -> list[Fault]:
    """Find what no table can see alone."""
    heads, n_future = recipe.loss.head_weights, recipe.model.n_future
    if heads and len(heads) != n_future:
        text = f"expected one number for each of `model.n_future` = {n_future} heads, got {len(heads)}"
        return [Fault(("loss", "head_weights"), text)]
    return []


def _plan(recipe: Recipe, choice: _Choice, document: Document) -> Plan:
    chosen = choice.chosen
    trackers = tuple(chosen["tracker", i] for i in range(len(recipe.tracker)))
    weighting, data, critic = chosen["weighting",], chosen["data",], chosen.get(("critic",))
    resolved = attrs.evolve(
        recipe,
        weighting=_resolved(recipe.weighting, weighting),
        data=_resolved(recipe.data, data),
        critic=_resolved(recipe.critic, critic) if recipe.critic and critic else None,
        tracker=tuple(_resolved(table, each) for table, each in zip(recipe.tracker, trackers, strict=True)),
    )
    text = recipe_to_toml(resolved)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    own_tags = {"algo": weighting.plugin.name}
    own_tags |= {f"wmtp.{each}": chosen[each,].address for each in ADDRESS_TAGS if (each,) in chosen}
    for name, plugin in sorted(choice.registry.loaded.items()):
        own_tags[f"{_PLUGIN_TAG}{name}"] = f"{plugin.found.distribution}=={plugin.found.version}"
    own_tags["wmtp.recipe_sha256"] = sha256
    return Plan(
        recipe=resolved,
        weighting=weighting,
        critic=critic,
        data=data,
        trackers=trackers,
        experiment=_experiment(recipe, weighting, trackers, document),
        tags=dict(tag_pairs(recipe.run.tags)) | own_tags,
        params=dict(flat(plain(resolved))),
        recipe_toml=text,
        recipe_sha256=sha256,
        files=tuple(document.files),
        same_result=tuple(sorted(key for at, each in chosen.items() for key in _same_result(each, at))),
    )


def _same_result(chosen: SelectedComponent, at: KeyPath) -> Iterator[str]:
    """Yield the dotted keys of the options marked `SAME_RESULT`, of a component and of what it wraps."""
    at = (*at, "options")
    for path in _marked(chosen.options):
        yield ".".join(map(str, (*at, *path)))
    for path, weighting in chosen.wrapped.items():
        yield from _same_result(weighting, (*at, *path))


def _marked(options: Any) -> Iterator[KeyPath]:
    for each in attrs.fields(type(options)) if attrs.has(type(options)) else ():
        if SAME_RESULT.items() <= each.metadata.items():
            yield (str(each.alias),)
        else:
            yield from ((str(each.alias), *path) for path in _marked(getattr(options, each.name)))


def _resolved(table: SelectionT, chosen: SelectedComponent) -> SelectionT:
    return attrs.evolve(table, use=chosen.address, options=chosen.plain_options())


def _experiment(
    recipe: Recipe, weighting: SelectedComponent, trackers: Sequence[SelectedComponent], document: Document
) -> str:
    if recipe.run.experiment is not None:
        return recipe.run.experiment
    for i, tracker in enumerate(trackers):
        prefix = getattr(tracker.options, "experiment_prefix", None)
        if isinstance(prefix, str):
            try:
                check_path(prefix)
            except ValueError as error:
                at = ("tracker", i, "options", "experiment_prefix")
                raise document.error([Fault(at, str(error))]) from error
            return f"{prefix}/{weighting.plugin.name}"
    return f"{DEFAULT_EXPERIMENT_PREFIX}/{weighting.plugin.name}"
