"""Finds changes of a recipe that lower the memory of a run, and how many bytes each change saves."""

from __future__ import annotations

from typing import Any

from attrs import evolve, frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.memory.documents import Documents
from weighted_mtp_core.memory.forecast import Forecast, forecast
from weighted_mtp_core.memory.parts import Target
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.recipe.schema import Recipe

_LEAST = 0.02  # share of the peak; smaller savings are not reported


@frozen(kw_only=True)
class Saving:
    """A change of one key that lowers the memory of a run.

    Attributes:
        change: The key and its new value, such as `train.accumulation = 4`.
        saved: Number of bytes by which the change lowers the peak of the device's memory.
        same_result: Whether the results of the run stay the same, except for rounding and for the random
            numbers of dropout.
    """

    change: str
    saved: int
    same_result: bool


def savings(plan: Plan, documents: Documents, before: Forecast) -> list[Saving]:
    """Return the changes that lower the peak by at least 2 %; each change is tried alone.

    Changes that keep the results of the run come first. Among changes of the same kind, the change that saves
    most comes first.
    """
    found = []
    for change, same_result in _changes(plan.recipe, before.target):
        try:
            recipe = change.of(plan.recipe)
            changed = evolve(plan, recipe=recipe)
            saved = before.peak - _peak(changed, documents.within(recipe.data.max_tokens), before)
        except (WmtpError, ValueError):  # recipe or model do not allow the change, or a package is missing
            continue
        if saved >= _LEAST * before.peak:
            found.append(Saving(change=str(change), saved=saved, same_result=same_result))
    return sorted(found, key=lambda each: (not each.same_result, -each.saved))


def _peak(changed: Plan, documents: Documents, before: Forecast) -> int:
    """Return the peak after a change; only phases that can contain the peak are simulated again."""
    totals = {phase.name: phase.total for phase in before.device}
    anew: set[str] = set()
    while (name := max(totals, key=lambda each: totals[each])) not in anew:
        after = forecast(changed, documents, before.target, only=name)
        totals[name] = next((phase.total for phase in after.device if phase.name == name), totals[name])
        anew.add(name)
    return totals[name]


@frozen
class _Change:
    """A key and its new value."""

    key: str
    value: bool | int | str

    def of(self, recipe: Recipe) -> Recipe:
        """Return the changed recipe; raise a ValueError if another key forbids the value."""
        *tables, name = self.key.split(".")
        owners: list[Any] = [recipe]
        for table in tables:
            owners.append(getattr(owners[-1], table))
        changed: Any = self.value
        for owner, part in zip(reversed(owners), reversed([*tables, name]), strict=True):
            changed = evolve(owner, **{part: changed})
        made: Recipe = changed
        return made

    def __str__(self) -> str:
        text = f'"{self.value}"' if isinstance(self.value, str) else str(self.value).lower()
        return f"{self.key} = {text}"


def _changes(recipe: Recipe, target: Target) -> list[tuple[_Change, bool]]:
    """Return the changes that can lower the memory; the bool is True if a change keeps the run's results."""
    same = [_Change(key, value) for key, value, is_open in _same_result(recipe, target) if is_open]
    other = [_Change(key, value) for key, value, is_open in _other_result(recipe, target) if is_open]
    return [*((each, True) for each in same), *((each, False) for each in other)]


def _same_result(recipe: Recipe, target: Target) -> list[tuple[str, bool | int | str, bool]]:
    """Return changes that keep the results, as (key, new value, whether the recipe allows the change)."""
    model, train, evaluate = recipe.model, recipe.train, recipe.evaluate
    most = max(1, train.batch_size // target.processes)
    fits = train.accumulation < most and train.batch_size % most == 0
    return [
        ("model.activation_checkpointing", True, not model.activation_checkpointing),
        ("train.accumulation", most, fits),
        ("model.shard", True, target.processes > 1 and not model.shard),
        ("evaluate.batch_size", max(1, evaluate.batch_size // 4), evaluate.batch_size > 1),
        ("evaluate.decoding", "plain", _drafts(recipe) and _is_greedy(recipe)),
    ]


def _other_result(recipe: Recipe, target: Target) -> list[tuple[str, bool | int | str, bool]]:
    """Return changes that affect the results, as (key, new value, whether the recipe allows the change)."""
    model, heads = recipe.model, recipe.loss.head_weights
    trains_heads = model.n_future > 1 and (not heads or any(heads[1:]))
    whole = model.train == "all"
    exact = model.train == "adapters" and model.base_dtype == "float32"
    return [
        ("evaluate.decoding", "plain", _drafts(recipe) and not _is_greedy(recipe)),
        ("model.dtype", "bfloat16", target.device != "cpu" and model.dtype == "float32"),
        ("train.optimiser.name", "adamw_8bit", recipe.train.optimiser.name == "adamw"),
        ("model.train", "adapters", whole),
        ("model.train", "heads", whole and trains_heads),
        ("model.base_dtype", "bfloat16", exact),
        ("model.base_dtype", "nf4", exact),
        ("model.n_future", 2, model.n_future > 2 and not heads),
        ("data.max_tokens", recipe.data.max_tokens // 2, recipe.data.max_tokens >= 16),
    ]


def _drafts(recipe: Recipe) -> bool:
    return recipe.evaluate.decoding == "self_speculative" and recipe.model.n_future > 1


def _is_greedy(recipe: Recipe) -> bool:
    """Return whether evaluation draws no random tokens, which plain decoding would draw differently."""
    return recipe.evaluate.temperature == 0 and recipe.evaluate.second_temperature is None
