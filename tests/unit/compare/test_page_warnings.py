"""The page warns of unequal steps, several kinds of machines, diverged runs and few validations."""

import csv
import json

from weighted_mtp_core.compare.jobs import plan_jobs
from weighted_mtp_core.compare.measures import RunMeasures, kinds_of_machines
from weighted_mtp_core.compare.table import Comparison
from weighted_mtp_core.tracking.run_history import Point


def test_runs_with_different_numbers_of_steps_are_named():
    def run(*steps):
        curve = [Point(step, 1.0, 1000 * step) for step in (0, *steps)]
        return RunMeasures.make({"policy_learning_rate": curve[1:], "validation_ce_head_1": curve})

    whole, early, earlier = run(10, 20, 30), run(10, 20), run(5, 10)
    uneven, even = (
        Comparison.make(runs, metrics=["validation_ce_head_1"], seeds=(0, 1))
        for runs in ({"a": {0: whole, 1: whole}, "b": {0: early, 1: earlier}}, {"a": {0: whole}})
    )

    assert uneven.uneven == ("`a`: 30 steps", "`b`: 10 to 20 steps")
    assert "**Unequal steps**: rows at equal steps compare the ends of these runs:\n\n- `a`: 30" in (
        uneven.markdown()
    )
    assert even.uneven == ()
    assert "Unequal" not in even.markdown()


def test_runs_on_machines_of_several_kinds_are_listed(arms, write_run, finish):
    jobs = plan_jobs(arms(("one", "")), [1, 2, 3])
    runs = [
        finish(job, instructions=kind) for job, kind in zip(jobs, ("AVX2", "AVX512", "AVX2"), strict=True)
    ]
    assert kinds_of_machines(runs[::2]) == []

    machines = kinds_of_machines(runs)
    page = Comparison.make(
        {"one": {1: write_run("a", (6, 4, 3))}},
        metrics=["validation_ce_head_1"],
        seeds=[1],
        machines=machines,
    ).markdown()

    assert machines == ["2 runs: instructions AVX2, device cpu", "1 run: instructions AVX512, device cpu"]
    assert "**Several kinds of machines**: rows at equal wall clock compare their speeds" in page
    assert "- 1 run: instructions AVX512, device cpu\n" in page


def test_a_diverged_run_is_shown_as_diverged_and_not_by_its_last_finite_value(write_run):
    runs = {
        "first": {0: write_run("a", (6, 4, 3)), 1: write_run("b", (6, 4, 3))},
        "other": {0: write_run("c", (6, 4, 2)), 1: write_run("d", (6, 4, "nan"))},
    }

    found = Comparison.make(runs, metrics=["validation_ce_head_1"], seeds=(0, 1))

    assert "| `first` | 2 | 3 | [3, 3] | - | - | - |" in found.markdown()
    assert "| `other` | 2 | diverged | - | - | - | - |" in found.markdown()
    assert found.diverged[0] == "`validation_ce_head_1` at equal steps: `other`, seed 1"
    assert f"- {found.diverged[0]}\n" in found.markdown()
    assert json.loads(found.json())["rows"][1]["values"] == {"0": 2, "1": None}
    line = list(csv.DictReader(found.csv().splitlines()))[1]
    assert (line["mean"], line["difference"], line["p_value"]) == ("", "", "")


def test_values_at_equal_wall_clock_between_few_validations_are_called_rough(comparison):
    text = comparison.markdown()

    assert comparison.few == (
        "`fast`: 2 validations after the start",
        "`slow`: 1 validation after the start",
    )
    assert "- `slow`: 1 validation after the start\n" in text
    assert "**Rough**: few validations, between which values at equal wall clock are interpolated" in text


def test_enough_validations_are_not_mentioned():
    curve = [Point(step, 1.0, 1000 * step) for step in (0, 10, 20, 30)]
    run = RunMeasures.make({"policy_learning_rate": curve[1:], "validation_ce_head_1": curve})

    found = Comparison.make({"a": {0: run}, "b": {0: run}}, metrics=["validation_ce_head_1"], seeds=(0,))

    assert found.few == ()
    assert "Rough" not in found.markdown()
