"""Arms from recipes, finished runs in the storage, and runs whose losses are given."""

import pytest
from weighted_mtp_core.compare.arms import read_arms
from weighted_mtp_core.compare.measures import read_measures
from weighted_mtp_core.compare.table import Comparison
from weighted_mtp_core.tracking.journal import Journal
from weighted_mtp_core.tracking.run_folder import RunFolder

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
def finish():
    """Leave a finished run of a job in the storage, by default the wanted one; return its folder."""

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

    return finish


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


@pytest.fixture
def comparison(write_run):
    """Arm `slow` is better by 0.5 at equal steps, but takes twice as long for a step."""
    runs = {
        "fast": {s: write_run(f"f{s}", (6.0, 4.0, 3.0 + s), step_seconds=1.0) for s in (0, 1)},
        "slow": {s: write_run(f"s{s}", (6.0, 4.0, 2.5 + s), step_seconds=2.0) for s in (0, 1)},
    }
    return Comparison.make(runs, metrics=["validation_ce_head_1"], seeds=(0, 1))
