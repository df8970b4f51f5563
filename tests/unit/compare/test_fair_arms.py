"""Arms have names of their own, and the same data and budget except for allowed differences."""

from pathlib import Path

import pytest
from weighted_mtp_core.compare.jobs import Job
from weighted_mtp_core.errors import WmtpError


def test_an_arm_is_called_as_its_run(arms):
    assert [arm.name for arm in arms(("one", ""), ("two", "options.beta = 0.5"))] == ["one", "two"]


def test_arms_that_share_a_name_are_refused(arms):
    with pytest.raises(WmtpError, match="are both called `one`") as error:
        arms(("one", ""), ("one", ""))

    assert "run.name" in error.value.hint


def test_every_difference_in_data_and_budget_is_listed(arms):
    other = "options.beta = 0.5\n[train]\nsteps = 7\n[model]\nn_future = 2\n[loss]\ndetach_trunk = true"

    with pytest.raises(WmtpError, match="cannot be compared") as error:
        arms(("one", ""), ("two", other))

    assert str(error.value).splitlines()[1:] == [
        "  model.n_future: 4 in `one`, 2 in `two`",
        "  train.steps: 300 in `one`, 7 in `two`",
    ]
    assert error.value.hint.endswith("--allow-difference model.n_future")


def test_a_difference_can_be_allowed(arms):
    one, two = arms(("one", ""), ("two", "[train]\nsteps = 7"), allowed=["train.steps"])

    assert (one.plan.recipe.train.steps, two.plan.recipe.train.steps) == (300, 7)


def test_an_option_that_does_not_change_the_result_may_differ(arms, finish):
    one, two = arms(("one", ""), ("two", "", 3))

    assert [arm.plan.params["data.options.workers"] for arm in (one, two)] == ["0", "3"]
    finish(Job(arm=one, seed=1), data__options__workers="7")
    assert Job(arm=one, seed=1).wanted.finished() is not None


def test_the_recipes_of_the_study_are_fair(repository):
    """Their plugins may not be installed here, so only the files themselves are read."""
    import tomli

    arms = sorted(Path(repository / "configs" / "study").glob("*.toml"))
    names = {tomli.loads(each.read_text())["run"]["name"]: each.stem for each in arms}

    assert all(name == stem for name, stem in names.items())
    for each in arms:
        table = tomli.loads(each.read_text())
        if each.stem not in {"uniform", "reference"}:
            assert set(table) <= {"extends", "run", "critic", "weighting"}
