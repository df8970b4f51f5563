"""The recipe of a run of two steps, how to run it again with changes, and the text that a run writes."""

from weighted_mtp_core.cli import main

RECIPE = """
    tracker = []
    [run]
    name = "tiny"
    [model]
    n_future = 3
    micro = { hidden_size = 16, layers = 2, attention_heads = 2, vocab_size = 300 }
    [data]
    use = "sums"
    [weighting]
    use = "flat_weights"
    [train]
    steps = 2
    batch_size = 4
    [evaluate]
    problems = 1
    max_new_tokens = 6
"""


def another_run(trained, name, *settings):
    """Run the recipe again, with changes and under another name; return the folder of the run."""
    changes = [word for each in settings for word in ("--set", each)]
    assert main(["run", "recipe.toml", "--run-name", name, *changes]) == 0
    (run,) = (file.parent for file in trained.parents[1].rglob(f"{name}/*/run.json"))
    return run


def generated(wmtp, *arguments):
    code, out, err = wmtp("generate", *arguments)
    assert code == 0, err
    return out
