"""Page and files hold means and differences of arms, at equal steps and at equal wall clock."""

import csv
import json

import pytest
from weighted_mtp_core.compare.table import Comparison


def test_equal_steps_and_equal_wall_clock_are_different_questions(comparison):
    found = [(row.at, row.arm, row.estimate.mean) for row in comparison.rows]

    assert comparison.seconds == pytest.approx(20)
    assert found == [
        ("equal steps", "fast", pytest.approx(3.5)),
        ("equal steps", "slow", pytest.approx(3.0)),
        ("equal wall clock", "fast", pytest.approx(3.5)),
        ("equal wall clock", "slow", pytest.approx(4.0)),  # step 10 of 20
    ]


def test_the_page_begins_with_one_table_of_all_arms_by_all_metrics(write_run):
    runs = {
        "first": {s: write_run(f"f{s}", (6, 4, 3 + s), test_ce_head_2=0.25, pass_at_1=1) for s in (0, 1)},
        "other": {0: write_run("c", (6, 4, 2), test_ce_head_2=1234.5)},
        "third": {s: write_run(f"t{s}", (6, 4, "nan"), test_ce_head_2=0.1 + s / 1000) for s in (0, 1)},
    }
    metrics = ["test_ce_head_2", "validation_ce_head_1", "pass_at_1"]

    page = Comparison.make(runs, metrics=metrics, seeds=(0, 1)).markdown()

    # Student's t with one degree of freedom: 12.706 times half of the distance of two values
    assert page.splitlines()[2:9] == [
        "| arm     | seeds | test_ce_head_2  | validation_ce_head_1 | pass_at_1 |",
        "| ------- | ----- | --------------- | -------------------- | --------- |",
        "| `first` | 2     | 0.25 ± 0        | 3.5 ± 6.4            | 1 ± 0     |",
        "| `other` | 1     | 1234            | 2                    | -         |",
        "| `third` | 2     | 0.1005 ± 0.0064 | diverged             | -         |",
        "",
        "Mean ± half the width of the 95 % interval, at equal steps.",
    ]


def test_a_mean_over_fewer_seeds_than_the_arm_has_says_so(write_run):
    runs = {"first": {0: write_run("a", (6, 4, 3), pass_at_5=0.5), 1: write_run("b", (6, 4, 3))}}

    page = Comparison.make(runs, metrics=["validation_ce_head_1", "pass_at_5"], seeds=(0, 1)).markdown()

    assert "| `first` | 2     | 3 ± 0                | 0.5 (1 seed) |" in page


def test_the_page_shows_differences_and_says_what_two_seeds_cannot_show(comparison):
    text = comparison.markdown()

    assert "| `slow` | 2 | 3 | [-3.353, 9.353] | -0.5 | [-0.5, -0.5] | 0.5 |" in text
    assert "With 2 pairs it cannot be below 0.5." in text


def test_the_files_hold_every_value(comparison):
    rows = list(csv.DictReader(comparison.csv().splitlines()))
    table = json.loads(comparison.json())

    assert [(row["arm"], row["at"]) for row in rows][1] == ("slow", "equal steps")
    assert float(rows[1]["difference"]) == pytest.approx(-0.5)
    assert rows[0]["difference"] == ""
    assert table["rows"][1]["values"] == {"0": 2.5, "1": 3.5}


def test_an_arm_is_compared_on_the_seeds_that_both_have(write_run):
    runs = {
        "first": {0: write_run("a", (1, 1, 1)), 1: write_run("b", (1, 1, 9))},
        "other": {0: write_run("c", (1, 1, 2))},
    }

    found = Comparison.make(
        runs, metrics=["validation_ce_head_1"], seeds=(0, 1), missing=["other-seed1: it fell over"]
    )

    assert found.rows[1].difference.estimate.mean == 1
    assert "- other-seed1: it fell over" in found.markdown()
