"""`--floor` and `--ceiling`: each other arm closes a share of the gap between these two arms."""

import json

import pytest
from weighted_mtp_core.compare.gap import Gap
from weighted_mtp_core.compare.table import Comparison
from weighted_mtp_core.errors import WmtpError


@pytest.fixture
def four_arms(write_run):
    """Final losses by arm and seed; the floor has a seed of its own, and one arm has only seed 1."""
    finals = {
        "plain": {0: 3.0, 1: 3.0},
        "floor": {0: 2.0, 1: 2.5, 2: 9.0},
        "mine": {1: 2.0},
        "oracle": {0: 1.0, 1: 1.0},
    }
    return {
        arm: {seed: write_run(f"{arm}{seed}", (6, 4, loss)) for seed, loss in by_seed.items()}
        for arm, by_seed in finals.items()
    }


def test_an_arm_closes_a_share_of_the_gap_over_the_seeds_that_all_three_arms_have(four_arms):
    gap = Gap.of("floor", "oracle", arms=list(four_arms))
    found = Comparison.make(four_arms, metrics=["validation_ce_head_1"], seeds=(0, 1, 2), gap=gap)

    assert [(each.arm, each.share.count) for each in found.closed] == [("plain", 2), ("mine", 1)]
    plain, mine = (each.share for each in found.closed)
    assert plain.mean == pytest.approx((1.0 + 0.5) / (-1.0 - 1.5))
    assert mine.mean == pytest.approx(-0.5 / -1.5)
    assert "## Share of the gap from `floor` to `oracle`" in found.markdown()
    assert "| `validation_ce_head_1` | `mine` | 1 | 0.333 | - |" in found.markdown()
    assert json.loads(found.json())["closed"][1]["share"]["mean"] == pytest.approx(1 / 3)


def test_without_a_floor_and_a_ceiling_there_is_no_section_about_a_gap(four_arms):
    found = Comparison.make(four_arms, metrics=["validation_ce_head_1"], seeds=(0, 1, 2))

    assert "Share of the gap" not in found.markdown()


@pytest.mark.parametrize(
    ("floor", "ceiling", "message"),
    [
        ("plain", None, "`--floor` and `--ceiling` belong together and must name two different arms"),
        ("plain", "plain", "`--floor` and `--ceiling` belong together and must name two different arms"),
        ("plain", "orakle", "`--ceiling orakle` does not name an arm"),
    ],
)
def test_a_gap_is_between_two_arms(floor, ceiling, message):
    with pytest.raises(WmtpError, match=message):
        Gap.of(floor, ceiling, arms=["plain", "oracle"])
