"""A run's last values, durations and curves come from its journal; a missing last value is NaN."""

import math

import pytest
from weighted_mtp_core.compare.measures import RunMeasures, default_metrics
from weighted_mtp_core.tracking.run_history import Point


def test_a_run_is_read_from_its_journal(write_run):
    run = write_run("slow", (6.0, 4.0, 3.0), step_seconds=2.0, pass_at_1=0.25)

    assert run.last["pass_at_1"] == 0.25
    assert run.last["validation_ce_head_1"] == 3.0
    assert run.policy_seconds == pytest.approx(40)
    assert run.last["critic_seconds"] == 0


@pytest.mark.parametrize(("log_every", "validate_every"), [(10, 10), (20, 10), (60, 10), (10, 20), (60, 60)])
def test_the_duration_of_a_run_excludes_validations(log_every, validate_every):
    """A step takes 1 s and a validation 7 s, whatever the intervals of records and validations."""
    clock, series = 0, {"policy_learning_rate": [], "validation_ce_head_1": [Point(0, 6.0, 0)]}
    for step in range(1, 61):
        clock += 1000
        if step % log_every == 0:
            series["policy_learning_rate"].append(Point(step, 1e-3, clock))
        if step % validate_every == 0:
            clock += 7000
            series["validation_ce_head_1"].append(Point(step, 5.0, clock))

    assert RunMeasures.make(series).policy_seconds == pytest.approx(60)


def test_between_two_validations_a_curve_is_a_line(write_run):
    run = write_run("slow", (6.0, 4.0, 3.0), step_seconds=2.0)

    found = [run.at_seconds("validation_ce_head_1", seconds) for seconds in (0, 10, 20, 30, 40, 99)]
    assert found == pytest.approx([6.0, 5.0, 4.0, 3.5, 3.0, 3.0])


def test_the_metrics_of_a_comparison_are_those_that_all_runs_have(write_run):
    runs = [
        write_run("one", (1, 1, 1), pass_at_1=0.5, test_ce_head_10=1.0, test_ce_head_2=1.0, unrelated=3.0),
        write_run("two", (1, 1, 1), pass_at_1=0.5, test_ce_head_10=1.0, test_ce_head_2=1.0, pass_at_5=0.5),
    ]

    assert default_metrics(runs) == [
        *("pass_at_1", "test_ce_head_2", "test_ce_head_10", "validation_ce_head_1"),
        *("policy_seconds", "critic_seconds"),
    ]


def test_a_curve_without_its_last_values_is_diverged_as_a_tracker_receives_finite_values_only():
    at = [Point(step, 1e-3, 1000 * step) for step in (10, 20)]
    run = RunMeasures.make(
        {"policy_learning_rate": at, "validation_ce_head_1": [Point(0, 6.0, 0), Point(10, 4.0, 10_000)]}
    )

    assert math.isnan(run.last["validation_ce_head_1"])
    assert run.at_seconds("validation_ce_head_1", 10) == 4.0
    assert math.isnan(run.at_seconds("validation_ce_head_1", 20))


def test_a_metric_without_a_value_at_the_last_record_is_diverged_as_well():
    at = [Point(step, 1e-3, 1000 * step) for step in (10, 20)]
    run = RunMeasures.make(
        {
            "policy_learning_rate": at,
            "train_loss": [Point(10, 2.0, 10_000)],
            "value_loss": [Point(10, 0.7, 3_000)],  # of stage 1
            "weight_mean": [Point(10, 1.0, 10_000), Point(20, 1.0, 20_000)],
        }
    )

    assert math.isnan(run.last["train_loss"])
    assert (run.last["value_loss"], run.last["weight_mean"]) == (0.7, 1.0)
