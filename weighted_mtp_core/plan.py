"""Turn a recipe into a plan: select and check all components, without building them or importing torch.

This step takes at most half a second, and reports errors in a recipe before data or a model are loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import attrs
from attrs import frozen

from weighted_mtp_core import run_tags
from weighted_mtp_core.api import SAME_RESULT, BuildContext, Signal
from weighted_mtp_core.api.tensors import CRITIC_SIGNALS, VALUES
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.identifiers import check_path, flat
from weighted_mtp_core.plugins.loading import Kind, PluginRegistry
from weighted_mtp_core.plugins.selection import ComponentSelector, SelectedComponent
from weighted_mtp_core.plugins.source_identity import source_identity
from weighted_mtp_core.recipe.document import Document, dotted
from weighted_mtp_core.recipe.layers import read_document
from weighted_mtp_core.recipe.line_numbers import KeyPath
from weighted_mtp_core.recipe.load import recipe_to_toml, structure_recipe
from weighted_mtp_core.recipe.schema import Recipe, Selection
from weighted_mtp_core.recipe.structure import Fault, plain

_DEFAULT_EXPERIMENT_PREFIX = "weighted_mtp"
_SOURCES = {Signal.LOG_VALUE: VALUES}  # core can compute the logarithm of a critic's values
_ADDRESS_TAGS = {"weighting": run_tags.WEIGHTING, "critic": run_tags.CRITIC, "data": run_tags.DATA}
SelectionT = TypeVar("SelectionT", bound=Selection)


@frozen(kw_only=True)
class Plan:
    """A resolved recipe and its components, checked as far as possible without building them.

    Attributes:
        recipe: The resolved recipe, in which addresses are complete and defaults are filled in.
        weighting: The weighting of the recipe.
        critic: The critic of the recipe; None if the recipe has no critic.
        data: The data source of the recipe.
        trackers: The trackers of the recipe, in the order of the recipe.
        experiment: `run.experiment`, or `<experiment_prefix>/<weighting plugin>` if the key is not set.
        tags: The tags that every tracker sets on the run.
        params: The resolved recipe as dotted keys.
        recipe_toml: The resolved recipe as text; a run of this text gives the same result.
        recipe_sha256: SHA-256 of `recipe_toml`.
        distributions: Version and source of the code on which the result depends, from `source_identity`.
        files: Every file from which the recipe was read, lowest layer first.
        same_result: Sorted dotted keys of the options that do not affect the result (`api.SAME_RESULT`).
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
    distributions: Mapping[str, str]
    files: tuple[str, ...] = ()
    same_result: tuple[str, ...] = ()

    @property
    def runs_folder(self) -> Path:
        """The folder of the runs of all experiments."""
        table = self.recipe.run
        return Path(table.output_dir) if table.output_dir else Path(table.storage) / "runs"

    @property
    def critic_label(self) -> str:
        """The critic's address, plugin, distribution and version, for messages; empty without a critic."""
        return f"critic `{self.critic.address}` of {self.critic.plugin}" if self.critic else ""

    @property
    def data_context(self) -> BuildContext:
        """The context in which the data source is built.

        The context allows negative weights in the data if the recipe allows negative weights, or if the
        weighting does not read the weights in the data.
        """
        run = self.recipe.run
        negative = self.recipe.loss.negative_weights or Signal.GIVEN not in self.weighting.needs
        return BuildContext(seed=run.seed, storage=Path(run.storage), negative_weights=negative)

    @property
    def identity(self) -> dict[str, dict[str, str]]:
        """The params and the source code of a run, which, with the data, determine the result of the run."""
        return {"params": dict(self.params), "distributions": dict(self.distributions)}


def make_plan(
    path: Path, *, preset: str | None = None, overrides: Sequence[str] = (), run_name: str | None = None
) -> Plan:
    """Read a recipe, load the plugins that it names, and check that its tables and components fit together.

    Args:
        path: The path of the recipe.
        preset: Name of a preset that changes the recipe.
        overrides: Texts of the form KEY=VALUE, from `--set`.
        run_name: The value of `run.name`; None leaves the value of the recipe.

    Raises:
        WmtpError: The recipe, the preset or an override cannot be read; keys of the recipe or options of
            components have errors, which the message lists; a component does not exist or its plugin cannot
            be loaded; or the weighting needs a critic's signal that no critic supplies.
    """
    return plan_document(read_document(path, preset=preset, overrides=overrides, run_name=run_name))


def plan_document(document: Document) -> Plan:
    """Make the plan of a recipe that was already read; raises errors as `make_plan` does after reading."""
    recipe, faults = structure_recipe(document)
    selector = ComponentSelector(document=document)
    if recipe is None:
        with suppress(WmtpError):  # the faults of the recipe are reported before faults of plugins
            _select(document.table, selector)
        raise document.error(faults + selector.faults)
    selected = _select(document.table, selector)
    weighting, critic = selected["weighting",], selected.get(("critic",))
    between = _head_faults(recipe) + _untrained_head_faults(recipe) + _sign_faults(recipe, weighting)
    between += _critic_faults(weighting, critic) + _optimiser_faults(recipe)
    if faults := selector.faults + between:
        raise document.error(faults)
    plan = _resolve(recipe, selected, selector.registry, document)
    _check_signals(plan, selector.registry)
    return plan


def _select(table: Mapping[str, Any], selector: ComponentSelector) -> dict[KeyPath, SelectedComponent]:
    """Select the component of every well-formed table, even if the recipe has faults elsewhere."""
    tables: list[tuple[Kind, KeyPath, Any]] = [
        (kind, (kind.value,), table.get(kind.value)) for kind in Kind if kind is not Kind.TRACKER
    ]
    if isinstance(trackers := table.get("tracker"), list):
        tables += [(Kind.TRACKER, ("tracker", i), each) for i, each in enumerate(trackers)]
    selected = {}
    for kind, at, selection in tables:
        if isinstance(selection, dict):
            use, options = selection.get("use"), selection.get("options", {})
            if isinstance(use, str) and isinstance(options, dict):
                selected[at] = selector.select(kind, use, options=options, at=at)
    return selected


def _head_faults(recipe: Recipe) -> list[Fault]:
    """Check keys about heads against keys of other tables, to which a table's validators have no access."""
    heads, n_future, train = recipe.loss.head_weights, recipe.model.n_future, recipe.model.train
    found = []
    if heads and len(heads) != n_future:
        text = f"expected one number for each of `model.n_future` = {n_future} heads, got {len(heads)}"
        found.append(Fault(("loss", "head_weights"), text))
    elif train == "heads" and heads and not any(heads[1:]):
        text = 'with `model.train = "heads"`, heads 2..K need a weight above 0'
        found.append(Fault(("loss", "head_weights"), text))
    elif train == "adapters" and recipe.loss.detach_trunk and heads and not heads[0]:
        text = "with `loss.detach_trunk` and no weight on head 1, adapters learn nothing"
        found.append(Fault(("model", "train"), f"{text}: `heads` trains heads 2..K alone"))
    if n_future == 1 and train == "heads":
        found.append(Fault(("model", "train"), "`heads` trains heads 2..K: `model.n_future` must be >= 2"))
    if train == "heads" and recipe.loss.head_schedule == "reverse":
        text = 'with `model.train = "heads"`, nothing is trained after the end of `reverse`'
        found.append(Fault(("loss", "head_schedule"), text))
    if n_future == 1 and recipe.loss.heads != "labels":
        text = f"`{recipe.loss.heads}` is for heads 2..K: `model.n_future` must be >= 2"
        found.append(Fault(("loss", "heads"), text))
    select_by = recipe.train.select_by
    if n_future == 1 and select_by in {"later_heads", "acceptance"}:
        found.append(Fault(("train", "select_by"), f"`{select_by}` needs `model.n_future` >= 2"))
    if n_future == 1 and recipe.train.head_learning_rate is not None:
        text = "the learning rate of heads 2..K needs `model.n_future` >= 2"
        found.append(Fault(("train", "head_learning_rate"), text))
    if train == "heads" and select_by == "head_1":
        text = 'with `model.train = "heads"`, head 1 stays as it is and selects nothing'
        found.append(Fault(("train", "select_by"), text))
    return found


def _untrained_head_faults(recipe: Recipe) -> list[Fault]:
    """Refuse keys that have no effect because all weight of the loss is on head 1."""
    heads = recipe.loss.head_weights
    if recipe.model.train == "heads" or recipe.model.n_future == 1 or not heads or any(heads[1:]):
        return []
    text = "needs a weight above 0 for one of heads 2..K in `loss.head_weights`"
    found = []
    if recipe.loss.heads != "labels":
        found.append(Fault(("loss", "heads"), f"`{recipe.loss.heads}` {text}"))
    if recipe.train.head_learning_rate is not None:
        found.append(Fault(("train", "head_learning_rate"), text))
    return found


def _optimiser_faults(recipe: Recipe) -> list[Fault]:
    """Refuse optimisers and learning rates that do not fit the parameters that are trained."""
    found = []
    if recipe.train.embedding_learning_rate is not None and recipe.model.train != "all":
        text = f'the embeddings are not trained with `model.train = "{recipe.model.train}"`'
        found.append(Fault(("train", "embedding_learning_rate"), text))
    if recipe.critic is not None and recipe.critic.train.optimiser.name == "muon":
        text = "`muon` is for the policy: a critic does not declare which parameters are embeddings"
        found.append(Fault(("critic", "train", "optimiser", "name"), text))
    return found


def _sign_faults(recipe: Recipe, weighting: SelectedComponent) -> list[Fault]:
    """Refuse `loss.negative_weights = true` for a weighting that does not declare negative weights."""
    if not recipe.loss.negative_weights or weighting.negative_weights:
        return []
    text = f"weighting `{weighting.address}` does not declare that its weights can be negative"
    return [Fault(("loss", "negative_weights"), text)]


def _critic_faults(weighting: SelectedComponent, critic: SelectedComponent | None) -> list[Fault]:
    """Refuse a critic that the weighting, or a weighting that it wraps, cannot use."""
    if critic is None:
        return []
    faults = []
    for each in weighting.nested:
        if (refuse := each.component.refuse_critic) is not None:
            with each.blamed("refuse_critic"):
                why = refuse(critic.options)
            faults += (
                [] if why is None else [Fault(("critic", "options"), f"weighting `{each.address}` {why}")]
            )
    return faults


def _check_signals(plan: Plan, registry: PluginRegistry) -> None:
    """Refuse a weighting that needs a critic's signal if no critic of the recipe supplies this signal."""
    provided = plan.critic.component.provides if plan.critic else frozenset()
    for signal in CRITIC_SIGNALS:
        sources = _SOURCES.get(signal, (signal,))
        if signal not in plan.weighting.needs or provided & {*sources}:
            continue
        lacking = f"critic `{plan.critic.address}` does not provide" if plan.critic else "no critic provides"
        use = next((found for each in sources for found in registry.providers(each)), "<plugin>.<critic>")
        raise WmtpError(
            f"weighting `{plan.weighting.address}` needs the signal `{signal.value}`, which {lacking}",
            hint=f'in table `[critic]`: use = "{use}"',
        )


def _resolve(
    recipe: Recipe,
    selected: Mapping[KeyPath, SelectedComponent],
    registry: PluginRegistry,
    document: Document,
) -> Plan:
    trackers = tuple(selected["tracker", i] for i in range(len(recipe.tracker)))
    weighting, data, critic = selected["weighting",], selected["data",], selected.get(("critic",))
    resolved = attrs.evolve(
        recipe,
        weighting=_resolved(recipe.weighting, weighting),
        data=_resolved(recipe.data, data),
        critic=_resolved(recipe.critic, critic) if recipe.critic and critic else None,
        tracker=tuple(_resolved(table, each) for table, each in zip(recipe.tracker, trackers, strict=True)),
    )
    text = recipe_to_toml(resolved)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    own_tags = {run_tags.ALGO: weighting.plugin.name}
    own_tags |= {
        tag: selected[table,].address for table, tag in _ADDRESS_TAGS.items() if (table,) in selected
    }
    for name, plugin in sorted(registry.loaded.items()):
        own_tags[f"{run_tags.PLUGIN_PREFIX}{name}"] = f"{plugin.found.distribution}=={plugin.found.version}"
    own_tags[run_tags.RECIPE_SHA256] = sha256
    components = (
        [weighting, data] if critic is None else [weighting, data, critic]
    )  # not the trackers, which do not affect the result
    distributions = source_identity(plugin for each in components for plugin in each.plugins)
    own_tags[run_tags.SOURCE_SHA256] = hashlib.sha256(json.dumps(distributions).encode()).hexdigest()
    return Plan(
        recipe=resolved,
        weighting=weighting,
        critic=critic,
        data=data,
        trackers=trackers,
        experiment=_experiment(recipe, weighting, trackers, document),
        tags=dict(run_tags.tag_pairs(recipe.run.tags)) | own_tags,
        params=dict(flat(plain(resolved))),
        recipe_toml=text,
        recipe_sha256=sha256,
        distributions=distributions,
        files=tuple(document.files),
        same_result=tuple(sorted(key for at, each in selected.items() for key in _same_result(each, at))),
    )


def _resolved(table: SelectionT, selected: SelectedComponent) -> SelectionT:
    return attrs.evolve(table, use=selected.address, options=selected.plain_options())


def _same_result(selected: SelectedComponent, at: KeyPath) -> Iterator[str]:
    """Yield the dotted keys of options marked `SAME_RESULT`, including options of wrapped weightings."""
    at = (*at, "options")
    for path in _marked(selected.options):
        yield dotted((*at, *path))
    for path, weighting in selected.wrapped.items():
        yield from _same_result(weighting, (*at, *path))


def _marked(options: Any) -> Iterator[KeyPath]:
    for each in attrs.fields(type(options)) if attrs.has(type(options)) else ():
        if SAME_RESULT.items() <= each.metadata.items():
            yield (str(each.alias),)
        else:
            yield from ((str(each.alias), *path) for path in _marked(getattr(options, each.name)))


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
    return f"{_DEFAULT_EXPERIMENT_PREFIX}/{weighting.plugin.name}"
