"""Algorithms are combined: the policy of an earlier run is the reference, and one weighting wraps several."""

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
    """A run of the baseline, and a run that uses the best model of the baseline as its reference."""
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


def test_a_success_ratio_to_the_power_of_zero_trains_as_uniform_weights_bit_for_bit(both, wmtp, tmp_path):
    uniform, _ = both
    settings = (
        'weighting={ use = "verifiable.success_ratio", options.power = 0.0 }',
        'critic={ use = "verifiable.value_head", allow_uninformative_critic = true, train.steps = 2 }',
    )
    options = [word for each in settings for word in ("--set", each)]
    weighed = wmtp("run", BASELINE, *QUICK, *options, cwd=tmp_path)
    assert weighed.returncode == 0, weighed.stderr

    def losses(run):
        return [
            {name: value for name, value in metrics.items() if name.startswith(("train_", "validation_"))}
            for metrics in of_policy(run)
        ]

    assert losses(weighed) == losses(uniform)
