"""Algorithms work together: an earlier run as the reference, and several weightings made into one."""

from pathlib import Path

import pytest

BASELINE = str(Path(__file__).parents[2] / "configs" / "baseline.toml")
QUICK = ("--preset", "ci", "--set", "train.steps=4")
PRODUCT = """{ use = "controls.product", options = { of = [
    { use = "dft.entropy", options = { keep = 0.9 } },
    { use = "rho1.excess_loss", options = { selection = "soft" } },
    { use = "controls.clip", options = { low = 0.1, of = { use = "dft.probability" } } },
] } }"""


@pytest.fixture(scope="module")
def both(wmtp, tmp_path_factory):
    """A run of the baseline, and one that takes its best model for a reference."""
    first = wmtp("run", BASELINE, *QUICK, cwd=tmp_path_factory.mktemp("first"))
    assert first.returncode == 0, first.stderr
    reference = first.folder / "checkpoints" / "best_model.pt"
    settings = (
        f"weighting={PRODUCT}",
        "critic.use=rho1.reference",
        f"critic.options.checkpoint={reference}",
    )
    options = [word for each in settings for word in ("--set", each)]
    second = wmtp("run", BASELINE, *QUICK, *options, cwd=tmp_path_factory.mktemp("second"))
    assert second.returncode == 0, second.stderr
    return first, second


def of_policy(run):
    return [line["metrics"] for line in run.journal if line["stage"] == "policy"]


def test_each_part_of_a_product_says_what_it_did(both):
    _, second = both
    logged = {name for metrics in of_policy(second) for name in metrics}

    assert {
        "entropy_mean_1",
        "excess_loss_mean_2",
        "own_probability_mean_3",
        "outside_clip_fraction_3",
    } <= logged


def test_the_reference_is_ahead_of_a_policy_that_begins(both):
    first, second = both
    trained = of_policy(first)[-1]["validation_ce_head_1"] - of_policy(first)[0]["validation_ce_head_1"]
    excess = next(metrics for metrics in of_policy(second) if "excess_loss_mean_2" in metrics)

    assert trained < 0
    assert excess["excess_loss_mean_2"] > 0
