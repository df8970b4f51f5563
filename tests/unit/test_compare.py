"""A comparison: fair arms, values from journals, the table, and execution of the missing runs only."""

import csv
import itertools
import json
import math
import pickle
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from textwrap import dedent

import pytest
from weighted_mtp_core.cli import main
from weighted_mtp_core.compare.arms import read_arms
from weighted_mtp_core.compare.gap import Gap
from weighted_mtp_core.compare.grid import parse_grids
from weighted_mtp_core.compare.jobs import Job, plan_jobs, refuse_other_data
from weighted_mtp_core.compare.measures import RunMeasures, default_metrics, kinds_of_machines, read_measures
from weighted_mtp_core.compare.runner import Runner, share_machine
from weighted_mtp_core.compare.table import Comparison
from weighted_mtp_core.compare.task import Ended, RunTask, execute, use_gpu
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.executors.address import open_executor
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
    assert Job(arm=one, seed=1).wanted.finished() is not None


# --------------------------------------------------------------------------- runs


def test_all_arms_come_equally_far(arms):
    jobs = plan_jobs(arms(("one", ""), ("two", "")), [42, 43])

    assert [job.label for job in jobs] == ["one-seed42", "two-seed42", "one-seed43", "two-seed43"]


def finish(
    job,
    *,
    status="FINISHED",
    seed=None,
    distributions=None,
    instructions="AVX2",
    changed=(),
    data="d1",
    **params,
):
    plan = job.arm.plan
    folder = RunFolder.create(plan.runs_folder, experiment=plan.experiment, name=job.arm.name)
    identity = job.arm.identity(job.seed if seed is None else seed)
    identity["params"] |= {key.replace("__", "."): value for key, value in params.items()}
    identity["fingerprint"] = {"instructions": instructions, "device": "cpu"}
    identity |= {"changed": changed, "data.sha256": data}
    folder.record(status=status, **identity | ({"distributions": distributions} if distributions else {}))
    folder.close()
    return folder.path


def test_a_finished_run_is_found_by_its_recipe_and_seed(arms):
    job = Job(arm=arms(("one", ""))[0], seed=43)
    finish(job, seed=42)
    path = finish(job)

    assert job.wanted.finished().absolute() == path


@pytest.mark.parametrize(
    "other",
    [
        {"status": "KILLED"},
        {"train__steps": "7"},
        {"weighting__options__beta": "0.1"},
        {"distributions": {"x": "2"}},
        {
            "changed": ["train.steps"]
        },  # resumed with more steps, so its first steps are those of a shorter run
    ],
)
def test_another_run_is_not_taken_for_it(arms, other):
    job = Job(arm=arms(("one", ""))[0], seed=43)
    finish(job, **other)

    assert job.wanted.finished() is None


def test_where_a_run_was_tracked_does_not_matter(arms):
    job = Job(arm=arms(("one", ""))[0], seed=43)
    path = finish(job, run__resume="never", tracker__0__use="example.paper", run__tags='["a:b"]')

    assert job.wanted.finished().absolute() == path


def test_runs_of_different_contents_of_one_data_file_are_refused(arms):
    jobs = plan_jobs(arms(("one", ""), ("two", "")), [1, 2])
    runs = {job: finish(job) for job in jobs[:3]}
    refuse_other_data(runs)
    runs[jobs[3]] = finish(jobs[3], data="d2")

    with pytest.raises(WmtpError) as caught:
        refuse_other_data(runs)

    assert str(caught.value) == (
        f"the data changed between runs: their SHA-256 is d1 in `{runs[jobs[0]]}` and d2 in `{runs[jobs[3]]}`"
    )
    assert caught.value.hint == (
        "delete the folders of the runs with the old data, restore the old data, or allow the difference: "
        "--allow-difference data.sha256"
    )
    refuse_other_data(runs, allowed=["data.sha256"])


def test_arms_with_other_options_of_the_data_may_have_other_data(arms):
    every = (*arms(("one", "")), *arms(("two", ""), overrides=['data.options.folder="there"']))

    refuse_other_data({job: finish(job, data=job.arm.name) for job in plan_jobs(every, [1, 2])})


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    assert share_machine(None, 35) == (8, 1)
    assert share_machine(None, 2) == (2, 4)
    assert share_machine(3, 35) == (3, 2)
    assert share_machine(None, 35, gpus=2) == (2, 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert share_machine(None, 35) == (2, 4)


@pytest.fixture
def run_jobs(tmp_path):
    """Complete jobs with `local:N`; return the outcome and what was logged."""

    def run(jobs, *, at_once, gpus=()):
        said = []
        names = itertools.cycle(gpus)
        plans = [job.arm.plan for job in jobs]
        each = (lambda: use_gpu(next(names))) if gpus else None
        with open_executor(f"local:{at_once}", plans, in_each_thread=each) as executor:
            runner = Runner(
                executor=executor,
                at_once=at_once,
                threads=1,
                logs=tmp_path,
                log=said.append,
                on_done=lambda _: None,
            )
            return runner.run(jobs), said

    return run


def test_runs_share_out_the_gpus(arms, run_jobs, tmp_path, monkeypatch):
    """Each run is a process that prints its GPU; none of them trains."""
    script = (
        "import os, sys, time; print('gpu', os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(1); sys.exit(1)"
    )
    monkeypatch.setattr(Job, "command", lambda _: ["-c", script])

    outcome, _ = run_jobs(plan_jobs(arms(("one", ""), ("two", "")), [1, 2]), at_once=4, gpus=("3", "5"))

    seen = sorted(
        (tmp_path / f"{failure.job.label}.log").read_text().split()[1] for failure in outcome.failures
    )
    assert seen == ["3", "3", "5", "5"]


def test_a_run_that_fails_is_named_with_its_log_and_stops_no_other(arms, run_jobs, tmp_path, monkeypatch):
    script = "print('error: no luck'); raise SystemExit(1)"
    monkeypatch.setattr(Job, "command", lambda _: ["-c", script])
    jobs = plan_jobs(arms(("one", ""), ("two", "")), [1])
    good = finish(jobs[1])

    outcome, said = run_jobs(jobs, at_once=1)

    assert {job.label: path.absolute() for job, path in outcome.finished.items()} == {"two-seed1": good}
    assert [(each.job.label, each.code, each.reason) for each in outcome.failures] == [
        ("one-seed1", 1, "no luck")
    ]
    assert said[-1] == f"one-seed1: FAILED (exit code 1), no luck; log {tmp_path / 'one-seed1.log'}"


class Scheduler(Executor):
    """Ends each task with the next given end: a result, an error or, for None, a cancellation."""

    def __init__(self, *ends):
        self._ends = iter(ends)

    def submit(self, *_):
        future = Future()
        end = next(self._ends)
        if isinstance(end, Ended):
            future.set_result(end)
        elif end is not None:
            future.set_exception(end)
        else:
            future.cancel()
        return future


@pytest.fixture
def run_at(tmp_path):
    """Complete jobs with a scheduler; return the outcome and what was logged."""

    def run(scheduler, jobs):
        said = []
        runner = Runner(
            executor=scheduler,
            at_once=None,
            threads=1,
            logs=tmp_path,
            log=said.append,
            on_done=lambda _: None,
        )
        try:
            return runner.run(jobs), said
        finally:
            assert not list(tmp_path.glob(".order*"))  # deleted, so that all tasks stop

    return run


def test_a_run_that_has_lost_too_many_workers_is_a_run_that_failed(arms, run_at):
    class KilledWorker(Exception):  # noqa: N818 - Dask's name
        pass

    ends = [KilledWorker("Attempted to run it on 4 different workers. See logs."), KilledWorker("Again.")]

    outcome, said = run_at(Scheduler(*ends), plan_jobs(arms(("one", "")), [1, 2]))

    assert [(each.job.label, each.code) for each in outcome.failures] == [("one-seed1", 1), ("one-seed2", 1)]
    assert outcome.failures[0].reason == "KilledWorker: Attempted to run it on 4 different workers"
    assert said[0].startswith("one-seed1: FAILED (exit code 1), KilledWorker: ")


def test_a_run_whose_folder_cannot_be_seen_here_is_a_run_that_failed(arms, run_at, monkeypatch):
    monkeypatch.setattr("weighted_mtp_core.compare.runner._SHARED_S", 0.1)
    elsewhere = Ended(code=0, folder=Path("runs/elsewhere"), reason="", host="node-3")

    outcome, _ = run_at(Scheduler(elsewhere), plan_jobs(arms(("one", "")), [1]))

    (failure,) = outcome.failures
    assert failure.reason == "`runs/elsewhere`, written on node-3, is not in the storage here"


def test_a_lost_scheduler_ends_the_comparison(arms, run_at):
    with pytest.raises(RunFailedError, match="the connection to the scheduler was lost") as error:
        run_at(Scheduler(None, None), plan_jobs(arms(("one", "")), [1, 2]))

    assert error.value.hint == "the same command resumes all runs"


def test_a_worker_that_refuses_a_run_ends_the_comparison(arms, run_at):
    refusal = WmtpError("the worker does not run the code of the client", hint="restart the worker")

    with pytest.raises(WmtpError, match="does not run the code of the client"):
        run_at(Scheduler(refusal, None), plan_jobs(arms(("one", "")), [1, 2]))


def test_a_run_ends_with_the_process_that_started_it(arms, tmp_path):
    """A process executes a task and is killed; the run then gets SIGTERM and reports it."""
    program = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), sys.exit(143)))
        print("began", flush=True)
        time.sleep(60)
    """
    job, log, order = Job(arm=arms(("one", ""))[0], seed=1), tmp_path / "log", tmp_path / "order"
    order.touch()
    command = ["-c", dedent(program)]
    task = RunTask(wanted=job.wanted, command=command, log=log, threads=1, order=order)
    execute = "import pickle, sys; from weighted_mtp_core.compare.task import execute; "
    execute += "execute(pickle.load(sys.stdin.buffer))"
    worker = subprocess.Popen([sys.executable, "-c", execute], stdin=subprocess.PIPE)
    worker.stdin.write(pickle.dumps(task))
    worker.stdin.close()

    wait_until(lambda: log.is_file() and log.read_text() == "began\n")
    worker.kill()
    worker.wait()

    wait_until(lambda: log.read_text() == "began\nstopped\n")


def wait_until(holds, *, seconds=20):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_worker_without_the_clients_storage_refuses_a_run(arms, tmp_path):
    job = Job(arm=arms(("one", ""))[0], seed=1)
    task = RunTask(
        wanted=job.wanted, command=["-c", ""], log=tmp_path / "log", threads=1, order=tmp_path / "order"
    )

    with pytest.raises(WmtpError, match=r"has no file `.*order`, which the client has written") as error:
        execute(task)

    assert error.value.hint.startswith("share the storage with the worker")


# --------------------------------------------------------------------------- grids


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


# --------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either recipes, or runs that are in MLflow with `--experiment` and `--runs`"),
        (["a.toml", "--runs", "1"], "name either recipes, or runs that are in MLflow"),
        (["--runs", "1", "--executor", "local:2"], "`--grid`, `--executor` and `--seeds` are for recipes"),
        (["--experiment", "a", "--seeds", "3"], "`--grid`, `--executor` and `--seeds` are for recipes"),
        (["a.toml", "--seeds", "0"], "`--seeds 0`: expected 1 to 20"),
        (["a.toml", "--seeds", "21"], "`--seeds 21`: expected 1 to 20"),
        (["a.toml", "--executor", "local:0"], "`--executor local:0`: expected `local:N` with N of 1 or more"),
        (["a.toml", "--executor", "dask://x"], "or `dask://HOST:PORT`"),
        (
            ["a.toml", "--set", "train.steps=9", "--grid", "train.steps=1,2"],
            "`--set train.steps=9` has no effect, because `--grid` sets the same key",
        ),
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


def test_the_metrics_of_a_comparison_are_those_that_all_runs_have(write_run):
    runs = [
        write_run("one", (1, 1, 1), pass_at_1=0.5, test_ce_head_10=1.0, test_ce_head_2=1.0, unrelated=3.0),
        write_run("two", (1, 1, 1), pass_at_1=0.5, test_ce_head_10=1.0, test_ce_head_2=1.0, pass_at_5=0.5),
    ]

    assert default_metrics(runs) == [
        *("pass_at_1", "test_ce_head_2", "test_ce_head_10", "validation_ce_head_1"),
        *("policy_seconds", "critic_seconds"),
    ]


def test_runs_on_machines_of_several_kinds_are_listed(arms, write_run):
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


def test_a_curve_without_a_step_that_all_runs_of_an_arm_have_is_not_drawn(tmp_path):
    from weighted_mtp_core.compare.plots import plot_curves

    runs = {
        step: RunMeasures(
            last={}, curves={"loss": [(step, 1.0)], "both": [(3, 1.0)]}, step_seconds=0.0, cost={}
        )
        for step in (5, 7)
    }

    files = plot_curves({"arm": runs}, ["loss", "both"], tmp_path)

    assert [file.name for file in files] == ["both.svg"]


def test_each_of_49_arms_is_drawn_in_another_style():
    from weighted_mtp_core.compare.plots import style

    assert len({str(style(number)) for number in range(49)}) == 49


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
