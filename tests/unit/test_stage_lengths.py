"""Whole runs whose length is given in epochs, or that stop early: what they record, and how they resume."""

import json

import pytest
from weighted_mtp_core.cli import main
from weighted_mtp_core.tracking.run_history import read_history

RECIPE = """
    tracker = []
    [run]
    name = "tiny"
    output_dir = "runs"
    [model]
    n_future = 2
    micro = { hidden_size = 16, layers = 2, attention_heads = 2, vocab_size = 300 }
    [data]
    use = "sums"
    [weighting]
    use = "flat_weights"
    [train]
    batch_size = 5
    validate_every = 2
    log_every = 3
    [evaluate]
    problems = 1
    max_new_tokens = 1
"""


@pytest.fixture
def run(install_plugin, flat_weights, judged_plugin, write_recipe, capsys):
    """Run the recipe with overrides, or resume a run; return run folder, history and output."""
    install_plugin("sums", judged_plugin)
    recipe = write_recipe(RECIPE)

    def run(*overrides, resume=None, code=0):
        sets = [part for each in overrides for part in ("--set", each)]
        more = [] if resume is None else ["--resume", resume.name]
        assert main(["run", str(recipe), *sets, *more]) == code
        folder = max(file.parent for file in recipe.parent.glob("runs/**/run.json"))
        return folder, read_history(folder), "".join(capsys.readouterr())

    return run


def last_step(history, stage):
    return max(points[-1].step for points in history.metrics[stage].values())


def test_a_run_of_epochs_records_its_steps_and_goes_on_for_more_epochs(run):
    folder, history, output = run("train.epochs=1.25")

    # 16 correct responses in batches of 5 are 4 batches
    assert (history.params["train.epochs"], history.params["train.steps"]) == ("1.25", "5")
    assert (last_step(history, "policy"), last_step(history, "evaluate")) == (5, 5)
    assert "`train.epochs`: 5 steps, with 4 steps per epoch" in output
    assert "5 x 5" in (folder / "report.html").read_text()

    _, history, _ = run("train.epochs=1.5", resume=folder)

    assert (last_step(history, "policy"), last_step(history, "evaluate")) == (6, 6)
    assert history.params["train.steps"] == "6"
    assert history.tags["wmtp.changed.train.epochs"] == "1.5"
    assert history.tags["wmtp.changed.train.steps"] == "6"


def test_a_run_that_stops_early_says_so_and_goes_on_with_more_patience(run):
    still = "train.learning_rate=1e-30"  # no state is better than the first one
    folder, history, output = run(still, "train.steps=7", "train.patience=2")

    assert (last_step(history, "policy"), last_step(history, "evaluate")) == (4, 4)
    assert history.tags["wmtp.stopped_early.policy"] == "4"
    assert "at step 0; stopped early after step 4 of 7" in output
    assert "stopped early after step 4" in (folder / "report.html").read_text()
    assert [point.step for point in history.points("policy", "train_loss")] == [3, 4]

    *_, output = run(still, "train.steps=7", "train.patience=2", resume=folder, code=2)
    assert "is finished" in output
    assert "raise `train.patience` to train it further" in output

    _, history, _ = run(still, "train.steps=7", resume=folder)

    assert (last_step(history, "policy"), last_step(history, "evaluate")) == (7, 7)
    assert history.tags["wmtp.stopped_early.policy"] == "no"
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["policy.last_step"], facts["policy.steps"]) == (7, 7)
