"""`--grid` makes an arm of each combination of values and refuses what cannot be meant."""

from pathlib import Path

import pytest
from weighted_mtp_core.compare.arms import read_arms
from weighted_mtp_core.compare.grid import parse_grids
from weighted_mtp_core.errors import WmtpError


def test_a_grid_makes_an_arm_of_each_combination_of_values(arms):
    grids = parse_grids(["weighting.options.beta=0.5,1.5", "train.learning_rate=1e-3, 1e-4"])

    found = arms(("one", ""), grids=grids)

    assert [arm.name for arm in found] == [
        "one-beta-0.5-learning_rate-1e-3",
        "one-beta-0.5-learning_rate-1e-4",
        "one-beta-1.5-learning_rate-1e-3",
        "one-beta-1.5-learning_rate-1e-4",
    ]
    last = found[-1].plan.recipe
    assert (last.weighting.options["beta"], last.train.learning_rate) == (1.5, 1e-4)
    assert last.run.tags == ("grid.weighting.options.beta:1.5", "grid.train.learning_rate:1e-4")


def test_a_grid_leaves_recipes_without_its_key_as_they_are(arms, install_plugin, flat_plugin):
    install_plugin("other", flat_plugin)
    other = "[run]\nname = 'two'\n[data]\nuse = 'example.lines'\noptions.folder = 'here'\n"
    Path("other.toml").write_text(other + "[weighting]\nuse = 'other.flat'\n")
    (one,) = arms(("one", ""))

    found = read_arms(
        [one.recipe, Path("other.toml")],
        preset=None,
        overrides=(),
        allowed=(),
        grids=parse_grids(["weighting.options.beta=1,2"]),
    )

    assert [arm.name for arm in found] == ["one-beta-1", "one-beta-2", "two"]


def test_values_of_a_grid_are_toml_as_for_set(arms):
    (clips,) = parse_grids(["weighting.options.clip=[0, 2],[0,3]"])
    (modes,) = parse_grids(["weighting.options.mode=a,'b,c'"])

    found = arms(("one", ""), grids=(clips, modes))  # `mode` has no default value

    assert [arm.name for arm in found][:2] == ["one-clip-0_2-mode-a", "one-clip-0_2-mode-b_c"]
    options = found[-1].plan.weighting.options
    assert (options.clip, options.mode) == ((0.0, 3.0), "b,c")


def test_a_key_that_no_recipe_has_is_refused(arms):
    with pytest.raises(WmtpError, match=r"no recipe has the key `weighting\.options\.betta`") as error:
        arms(("one", ""), grids=parse_grids(["weighting.options.betta=1,2"]))

    assert error.value.hint == "did you mean `weighting.options.beta`?"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["train.steps"], "cannot read `--grid train.steps`"),
        (["train.steps=1,,2"], "cannot read `--grid train.steps=1,,2`"),
        (["train.x=[1,2"], r"cannot read `--grid train.x=\[1,2`"),
        (["train.steps=1,2,1"], "a value is repeated"),
        (["train.steps=1", "train.steps=2"], "`train.steps` is given twice"),
        (["run.seed=1,2"], "`run.seed` cannot be a grid"),
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused(texts, message):
    with pytest.raises(WmtpError, match=message):
        parse_grids(texts)
