"""`recipe new` writes a recipe that `check` accepts for every installed component."""

import re

import pytest
from weighted_mtp_core.cli import main
from weighted_mtp_core.plan import make_plan
from weighted_mtp_core.plugins.loading import Kind, PluginRegistry

REGISTRY = PluginRegistry()
ADDRESSES = [
    (kind, address)
    for kind in Kind
    for name in REGISTRY.found
    for address in REGISTRY.load(name).addresses(kind)
]
UNIFORM = "{use = 'baseline_mtp.uniform'}"
REQUIRED = {
    "code_tasks.problems": ["data.options.path=problems.jsonl"],
    "controls.anneal": [f"weighting.options.of={UNIFORM}", "weighting.options.end=5"],
    "controls.clip": [f"weighting.options.of={UNIFORM}"],
    "controls.product": [f"weighting.options.of=[{UNIFORM}, {UNIFORM}]"],
    "controls.random_matched": [f"weighting.options.of={UNIFORM}"],
    "controls.record": [f"weighting.options.of={UNIFORM}", "weighting.options.name=kept"],
    "controls.replay": ["weighting.options.name=kept"],
    "controls.shuffled": [f"weighting.options.of={UNIFORM}"],
    "rho1.excess_loss": ["critic.use=rho1.reference"],
    "verifiable.td_error": ["critic.use=verifiable.value_head"],
    "verifiable.success_ratio": ["critic.use=verifiable.value_head"],
}


@pytest.mark.parametrize(("kind", "address"), ADDRESSES, ids=[address for _, address in ADDRESSES])
def test_its_recipe_is_accepted_and_shows_the_defaults(kind, address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"data": "core.jsonl", "weighting": "baseline_mtp.uniform"} | (
        {} if kind is Kind.TRACKER else {kind.value: address}
    )
    overrides = [f"tracker=[{{use = '{address}'}}]"] if kind is Kind.TRACKER else REQUIRED.get(address, [])
    arguments = [part for key, use in settings.items() for part in (f"--{key}", use)]
    arguments += [part for each in overrides for part in ("--set", each)]

    assert main(["recipe", "new", *arguments]) == 0

    assert main(["check", "recipe.toml"]) == 0
    text = (tmp_path / "recipe.toml").read_text()
    shown = re.sub(r"^#(?! )(?!.*= \.\.\.$)", "", text, flags=re.MULTILINE)
    (tmp_path / "shown.toml").write_text(shown)
    written, with_defaults = (
        make_plan(tmp_path / name).recipe_toml for name in ("recipe.toml", "shown.toml")
    )
    assert with_defaults == written
