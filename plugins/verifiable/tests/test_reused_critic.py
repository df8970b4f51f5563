"""A later run reuses the critic that an earlier run trained, and skips stage 1."""

import json
from pathlib import Path

import pytest

CRITIC = {
    "use": "verifiable.value_head",
    "options": {"hidden_size": 16, "heads": 2, "layers": 1, "body": "trunk", "lora_rank": 2},
    "allow_uninformative_critic": True,
    "train": {"steps": 3, "learning_rate": 0.01, "validate_every": 1, "validation_examples": 8},
}


def journal(folder, *, kind="metrics"):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["kind"] == kind]


def values(folder):
    """Return the critic's value of each token in a run's `token_values.jsonl`."""
    table = (folder / "evaluation" / "token_values.jsonl").read_text(encoding="utf-8")
    lines = map(json.loads, table.splitlines())
    return {(line["example"], line["position"]): line["value"] for line in lines}


@pytest.mark.slow
def test_a_later_recipe_takes_the_critic_as_it_is_and_measures_it_again(wmtp_tiny_run, wmtp_cli, capsys):
    first = wmtp_tiny_run({"weighting": {"use": "verifiable.td_error"}, "critic": CRITIC}).folder
    checkpoint = first / "checkpoints" / "critic"

    override = f"critic.checkpoint={checkpoint}"
    assert wmtp_cli("run", "recipe.toml", "--set", override, "--run-name", "later") == 0

    (later,) = (path.parent for path in Path("storage/runs").glob("*/*/later/*/run.json"))
    assert f"critic loaded from `{checkpoint}`" in capsys.readouterr().out
    assert not (later / "checkpoints" / "critic").exists()
    assert values(later) == values(first)
    of_critic = [line for line in journal(later) if line["stage"] == "critic"]
    assert [line["step"] for line in of_critic] == [0]
    measured = [line["metrics"] for line in journal(first) if "critic_auc" in line["metrics"]]
    assert len(measured) == 4 + 1  # validations, and the judgement of the checkpoint that was kept
    assert of_critic[0]["metrics"] == measured[-1]


@pytest.mark.slow
def test_a_checkpoint_of_another_shape_stops_the_run_before_the_policy(wmtp_tiny_run, wmtp_cli, capsys):
    first = wmtp_tiny_run({"weighting": {"use": "verifiable.td_error"}, "critic": CRITIC}).folder
    checkpoint = first / "checkpoints" / "critic"
    capsys.readouterr()
    changes = (f"critic.checkpoint={checkpoint}", "critic.options.hidden_size=32")

    code = wmtp_cli("run", "recipe.toml", *(word for change in changes for word in ("--set", change)))

    said = capsys.readouterr()
    assert code == 2
    assert "the state is not that of this `value_head`" in said.err
    assert "policy: " not in said.out
