"""A comparison: fair arms, values from journals, the table, and execution of the missing runs only."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
from weighted_mtp_core.cli import main
from weighted_mtp_core.compare.arms import read_arms
from weighted_mtp_core.compare.gap import Gap
from weighted_mtp_core.compare.measures import RunMeasures, default_metrics, read_measures
from weighted_mtp_core.compare.runner import Job, Runner, find_finished, plan_jobs, share_machine
from weighted_mtp_core.compare.table import Comparison
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.tracking.journal import Journal
from weighted_mtp_core.tracking.run_folder import RunFolder
from weighted_mtp_core.tracking.run_history import Point

RECIPE = """
    [run]
    name = "{name}"
    [data]
    use = "example.lines"
    options = {{ folder = "here", workers = {workers} }}
    [weighting]
    use = "example.flat"
    {more}
"""


@pytest.fixture
def arms(write_recipe, example_plugin):
    """Write recipes from (name, more) and read them as arms."""

    def arms(*recipes, **settings):
        paths = [
            write_recipe(
                RECIPE.format(name=name, more=more, workers=workers[0] if workers else 0), f"{name}_{i}.toml"
            )
            for i, (name, more, *workers) in enumerate(recipes)
        ]
        return read_arms(paths, **{"preset": None, "overrides": (), "allowed": (), **settings})

    return arms


@pytest.fixture
def write_run(tmp_path):
    """Write a journal with validations of stage 2 at steps 0, 10 and 20; return the run's measures."""

    def write(name, losses, *, step_seconds=1.0, **final):
        folder = tmp_path / name
        folder.mkdir()
        journal = Journal(folder / "metrics.jsonl")
        journal.append("run", {"run_id": name, "name": name, "experiment": "weighted_mtp/example"})
        for step, loss in zip((0, 10, 20), losses, strict=True):
            at = {"step": step, "stage": "policy"}
            time_ms = round(1_000_000 + 1000 * step_seconds * step)
            if step:
                journal.append("metrics", {**at, "metrics": {"policy_learning_rate": 1e-3}}, time_ms=time_ms)
            journal.append("metrics", {**at, "metrics": {"validation_ce_head_1": loss}}, time_ms=time_ms)
        journal.append("metrics", {"step": 20, "stage": "evaluate", "metrics": final})
        journal.close()
        return read_measures(folder)

    return write


# --------------------------------------------------------------------------- arms


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


def test_an_option_that_does_not_change_the_result_may_differ(arms):
    one, two = arms(("one", ""), ("two", "", 3))

    assert [arm.plan.params["data.options.workers"] for arm in (one, two)] == ["0", "3"]
    finish(Job(arm=one, seed=1), data__options__workers="7")
    assert find_finished(Job(arm=one, seed=1)) is not None


# --------------------------------------------------------------------------- runs


def test_all_arms_come_equally_far(arms):
    jobs = plan_jobs(arms(("one", ""), ("two", "")), [42, 43])

    assert [job.label for job in jobs] == ["one-seed42", "two-seed42", "one-seed43", "two-seed43"]


def finish(job, *, status="FINISHED", seed=None, distributions=None, **params):
    plan = job.arm.plan
    folder = RunFolder.create(plan.runs_folder, experiment=plan.experiment, name=job.arm.name)
    identity = job.arm.identity(job.seed if seed is None else seed)
    identity["params"] |= {key.replace("__", "."): value for key, value in params.items()}
    folder.record(status=status, **identity | ({"distributions": distributions} if distributions else {}))
    folder.close()
    return folder.path


def test_a_finished_run_is_found_by_its_recipe_and_seed(arms):
    job = Job(arm=arms(("one", ""))[0], seed=43)
    finish(job, seed=42)
    path = finish(job)

    assert find_finished(job).absolute() == path


@pytest.mark.parametrize(
    "other",
    [
        {"status": "KILLED"},
        {"train__steps": "7"},
        {"weighting__options__beta": "0.1"},
        {"distributions": {"x": "2"}},
    ],
)
def test_another_run_is_not_taken_for_it(arms, other):
    job = Job(arm=arms(("one", ""))[0], seed=43)
    finish(job, **other)

    assert find_finished(job) is None


def test_where_a_run_was_tracked_does_not_matter(arms):
    job = Job(arm=arms(("one", ""))[0], seed=43)
    path = finish(job, run__resume="never", tracker__0__use="example.paper", run__tags='["a:b"]')

    assert find_finished(job).absolute() == path


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    assert share_machine(None, 35) == (8, 1)
    assert share_machine(None, 2) == (2, 4)
    assert share_machine(3, 35) == (3, 2)
    assert share_machine(None, 35, gpus=2) == (2, 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert share_machine(None, 35) == (2, 4)


def test_runs_share_out_the_gpus(arms, tmp_path, monkeypatch):
    """Each run is a process that prints its GPU; none of them trains."""
    script = "import os, sys; print('gpu', os.environ['CUDA_VISIBLE_DEVICES']); sys.exit(1)"
    monkeypatch.setattr(Job, "command", lambda _: [sys.executable, "-c", script])
    runner = Runner(
        at_once=4, threads=1, gpus=("3", "5"), logs=tmp_path, log=lambda _: None, on_done=lambda _: None
    )

    outcome = runner.run(plan_jobs(arms(("one", ""), ("two", "")), [1, 2]))

    seen = sorted(
        (tmp_path / f"{failure.job.label}.log").read_text().split()[1] for failure in outcome.failures
    )
    assert seen == ["3", "3", "5", "5"]


def test_a_run_that_fails_is_named_with_its_log_and_stops_no_other(arms, tmp_path, monkeypatch):
    script = "print('error: no luck'); raise SystemExit(1)"
    monkeypatch.setattr(Job, "command", lambda _: [sys.executable, "-c", script])
    jobs = plan_jobs(arms(("one", ""), ("two", "")), [1])
    good = finish(jobs[1])
    said = []
    runner = Runner(at_once=1, threads=1, logs=tmp_path, log=said.append, on_done=lambda _: None)

    outcome = runner.run(jobs)

    assert {job.label: path.absolute() for job, path in outcome.finished.items()} == {"two-seed1": good}
    assert [(each.job.label, each.code, each.reason) for each in outcome.failures] == [
        ("one-seed1", 1, "no luck")
    ]
    assert said[-1] == f"one-seed1: FAILED (exit code 1), no luck; log {tmp_path / 'one-seed1.log'}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either recipes, or runs that are in MLflow with `--experiment` and `--runs`"),
        (["a.toml", "--runs", "1"], "name either recipes, or runs that are in MLflow"),
        (["--runs", "1", "--jobs", "2"], "`--preset`, `--set` and `--jobs` are for recipes"),
        (["a.toml", "--seeds", "21"], "`--seeds 21`: expected 1 to 20"),
        (["a.toml", "--jobs", "0"], "`--jobs 0`: expected 1 or more"),
        (["a.toml", "--set", "run.seed=1"], "`--set run.seed` would give every run the same seed"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, message, capsys):
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------- measures


def test_a_run_is_read_from_its_journal(write_run):
    run = write_run("slow", (6.0, 4.0, 3.0), step_seconds=2.0, pass_at_1=0.25)

    assert run.last["pass_at_1"] == 0.25
    assert run.last["validation_ce_head_1"] == 3.0
    assert run.policy_seconds == pytest.approx(40)
    assert run.last["critic_seconds"] == 0


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


# --------------------------------------------------------------------------- the table


@pytest.fixture
def comparison(write_run):
    """Arm `slow` is better by 0.5 at equal steps, but takes twice as long for a step."""
    runs = {
        "fast": {s: write_run(f"f{s}", (6.0, 4.0, 3.0 + s), step_seconds=1.0) for s in (0, 1)},
        "slow": {s: write_run(f"s{s}", (6.0, 4.0, 2.5 + s), step_seconds=2.0) for s in (0, 1)},
    }
    return Comparison.make(runs, metrics=["validation_ce_head_1"], seeds=(0, 1))


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


@pytest.fixture
def four_arms(write_run):
    """Final losses by arm and seed; the floor has a seed of its own, and one arm has seed 1 alone."""
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


def test_a_curve_without_its_last_values_is_diverged_as_a_tracker_receives_finite_values_only():
    at = [Point(step, 1e-3, 1000 * step) for step in (10, 20)]
    run = RunMeasures.make(
        {"policy_learning_rate": at, "validation_ce_head_1": [Point(0, 6.0, 0), Point(10, 4.0, 10_000)]}
    )

    assert math.isnan(run.last["validation_ce_head_1"])
    assert run.at_seconds("validation_ce_head_1", 10) == 4.0
    assert math.isnan(run.at_seconds("validation_ce_head_1", 20))


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


def test_curves_are_drawn_the_same_each_time(write_run, tmp_path):
    from weighted_mtp_core.compare.plots import plot_curves

    runs = {
        arm: {s: write_run(f"{arm}{s}", (6.0, 4.0 + s, 3.0 + s / 2)) for s in (0, 1)}
        for arm in ("one", "two")
    }
    (first,) = plot_curves(runs, ["validation_ce_head_1", "no_curve"], tmp_path)
    drawn = first.read_bytes()
    (again,) = plot_curves(runs, ["validation_ce_head_1"], tmp_path)

    assert first.name == "validation_ce_head_1.svg"
    assert again.read_bytes() == drawn


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
